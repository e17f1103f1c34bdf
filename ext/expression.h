/* expression.h (hot path): a compiled expression over one row, and how other extensions evaluate it.
 *
 * A program is a list of instructions for a small register machine. The type of a register is fixed at load by the
 * compiler (expressions.py), so an instruction has one type and no row decides on types. What must stay true: unknown
 * (null) is carried, never guessed, as in SQL.
 *
 * Registers, by type:
 *   float64           v.f; null is NaN, so arithmetic carries null by itself
 *   int64, timestamp  v.i with t = INT; past int64 the result rounded to a double, v.f with t = WIDE (S13); t = NULLED
 *   bool              v.i: FALSE 0 < UNKNOWN 1 < TRUE 2, so `and` is min, `or` is max, `not` is 2 - x (Kleene)
 *   string            v.s and t = length in bytes; t = -1 is null
 */
#ifndef PENSTOCK_EXPRESSION_H
#define PENSTOCK_EXPRESSION_H

#include "row.h"

/* Suffixes: F float64, I int64 and timestamp, B bool, S string. RR: two registers; RK: register and constant; SK: row
 * slot and constant. IF compares an int64 register a with a float64 register b, exactly. */
#define PS_COMPARISONS(X, suffix) \
    X(EQ_##suffix) X(NE_##suffix) X(LT_##suffix) X(LE_##suffix) X(GT_##suffix) X(GE_##suffix)
#define PS_OPCODES(X) \
    X(RETURN) \
    X(LOAD_F) X(LOAD_I) X(LOAD_B) X(LOAD_S) /* dst <- slot a */ \
    X(CONST_F) X(CONST_I) X(CONST_B) X(CONST_S) /* dst <- k; I and S: a is the tag, 0 a value */ \
    X(I_TO_F) \
    X(ADD_F) X(SUB_F) X(MUL_F) X(DIV_F) X(FLOORDIV_F) X(MOD_F) X(MIN_F) X(MAX_F) \
    X(NEG_F) X(ABS_F) X(FLOOR_F) X(CEIL_F) X(LOG_F) X(EXP_F) X(SQRT_F) \
    X(ADD_I) X(SUB_I) X(MUL_I) X(FLOORDIV_I) X(MOD_I) X(MIN_I) X(MAX_I) X(NEG_I) X(ABS_I) \
    PS_COMPARISONS(X, F_RR) PS_COMPARISONS(X, F_RK) PS_COMPARISONS(X, F_SK) \
    PS_COMPARISONS(X, I_RR) PS_COMPARISONS(X, I_RK) PS_COMPARISONS(X, I_SK) \
    PS_COMPARISONS(X, IF_RR) PS_COMPARISONS(X, S_RR) PS_COMPARISONS(X, S_RK) PS_COMPARISONS(X, S_SK) \
    X(EQ_B) X(NE_B) \
    X(IN_F) X(IN_I) X(IN_S) /* k: first (low 32 bits) and count (high 32) in the sorted pool */ \
    X(NOT) X(AND) X(OR) \
    X(JUMP_FALSE) X(JUMP_TRUE) /* if register a: go to instruction k */ \
    X(IS_NULL_F) X(IS_NULL_I) X(IS_NULL_B) X(IS_NULL_S) \
    X(COALESCE_F) X(COALESCE_I) X(COALESCE_B) X(COALESCE_S) \
    X(YEAR) X(MONTH) X(DAY) X(HOUR) X(MINUTE) X(SECOND) X(WEEKDAY)

enum ps_opcode {
#define X(name) PS_OP_##name,
    PS_OPCODES(X)
#undef X
    PS_OP_COUNT
};

#define PS_MAX_REGISTERS 64

typedef struct {
    uint16_t op;
    uint16_t dst;
    uint16_t a;
    uint16_t b;
    ps_slot k; /* constant; a string as PS_STR(offset, length) into text */
} ps_instruction;

typedef struct {
    ps_instruction *code; /* ends with RETURN; the result is in register 0 */
    uint32_t n_code;
    uint32_t type; /* enum ps_type of the result; never PS_STRING */
    char *text;    /* bytes of the string constants */
    double *floats;
    int64_t *ints;
    uint64_t *strings; /* PS_STR into text */
} ps_program;

typedef struct {
    /* For a program of type bool: 1 true, 0 false, -1 unknown. Pure, any thread, no GIL. */
    int (*test)(const ps_program *, const ps_slot *slots, const uint8_t *status, const char *arena);
    /* The value: PS_PRESENT (an int64 perhaps with PS_WIDE), or PS_NULL_VALUE and NaN or 0. */
    void (*value)(const ps_program *, const ps_slot *slots, const uint8_t *status, const char *arena, ps_slot *out,
                  uint8_t *out_status);
} ps_expression_api;

extern const ps_expression_api ps_expression;
extern const char *const ps_opcode_names[PS_OP_COUNT];

#endif
