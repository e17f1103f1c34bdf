/* expression.c (hot path): the register machine of expression.h.
 *
 * What an operation means, wherever a reader might doubt:
 *   - null in, null out, for arithmetic, functions and comparisons; `and`, `or`, `not` are Kleene's.
 *   - x / 0, x // 0, x % 0, log(x <= 0), sqrt(x < 0) and NaN are null. An overflowing float is an infinity.
 *   - `/` divides float64s. `//` and `%` floor, as in Python: the remainder has the divisor's sign.
 *   - int64 arithmetic is exact; past int64 the exact result is rounded once to a double and stays one (S13).
 *   - int64 with float64: arithmetic converts the integer, a comparison is exact.
 */
#include "expression.h"

#include <math.h>
#include <string.h>

enum { INT = 0, WIDE = 1, NULLED = 2 };
enum { FALSE_ = 0, UNKNOWN = 1, TRUE_ = 2 };

typedef struct {
    union {
        double f;
        int64_t i;
        const char *s;
    } v;
    int64_t t;
} reg;

const char *const ps_opcode_names[PS_OP_COUNT] = {
#define X(name) #name,
    PS_OPCODES(X)
#undef X
};

#define NULL_F __builtin_nan("")

static inline int present(uint8_t status) { return (status & 7) == PS_PRESENT; }

static inline double load_f(const ps_slot *slots, const uint8_t *status, uint32_t slot) {
    return present(status[slot]) ? slots[slot].f : NULL_F;
}

static inline reg load_i(const ps_slot *slots, const uint8_t *status, uint32_t slot) {
    reg r;
    r.v.i = slots[slot].i;
    r.t = present(status[slot]) ? status[slot] >> 7 : NULLED;
    return r;
}

static inline reg load_s(const ps_slot *slots, const uint8_t *status, const char *arena, uint32_t slot) {
    reg r;
    r.v.s = arena + PS_STR_OFFSET(slots[slot].u);
    r.t = present(status[slot]) ? (int64_t)PS_STR_LENGTH(slots[slot].u) : -1;
    return r;
}

/* ---- float64 ---- */

static inline double floordiv_f(double x, double y) {
    if (y == 0) return NULL_F;
    double mod = fmod(x, y), div = (x - mod) / y;
    if (mod != 0 && (y < 0) != (mod < 0)) div -= 1;
    if (div == 0) return copysign(0.0, x / y);
    double floored = floor(div);
    return div - floored > 0.5 ? floored + 1 : floored; /* div may have been rounded below the integer it is */
}

static inline double mod_f(double x, double y) {
    if (y == 0) return NULL_F;
    double mod = fmod(x, y);
    if (mod == 0) return copysign(0.0, y);
    return (y < 0) != (mod < 0) ? mod + y : mod;
}

/* ---- int64, perhaps wide ---- */

static inline double as_double(reg r) { return r.t == NULLED ? NULL_F : r.t == WIDE ? r.v.f : (double)r.v.i; }

static inline reg integer(int64_t i) {
    reg r;
    r.v.i = i;
    r.t = INT;
    return r;
}

static inline reg wide(double f) {
    reg r;
    r.v.f = f;
    r.t = f != f ? NULLED : WIDE;
    return r;
}

/* Out of line: a null, a wide operand, or a result past int64. */
static __attribute__((noinline)) reg slow_i(int op, reg a, reg b) {
    if (a.t == INT && b.t == INT) {
        __int128 x = a.v.i, y = b.v.i;
        return wide((double)(op == PS_OP_ADD_I ? x + y : op == PS_OP_SUB_I ? x - y : x * y));
    }
    double x = as_double(a), y = as_double(b);
    switch (op) {
    case PS_OP_ADD_I:
        return wide(x + y);
    case PS_OP_SUB_I:
        return wide(x - y);
    case PS_OP_MUL_I:
        return wide(x * y);
    case PS_OP_FLOORDIV_I:
        return wide(floordiv_f(x, y));
    default:
        return wide(mod_f(x, y));
    }
}

static inline reg floordiv_i(reg a, reg b) {
    if (a.t | b.t) return slow_i(PS_OP_FLOORDIV_I, a, b);
    if (b.v.i == 0) return wide(NULL_F);
    if (b.v.i == -1) { /* the one quotient past int64: INT64_MIN // -1 */
        if (a.v.i == INT64_MIN) return wide(9223372036854775808.0);
        return integer(-a.v.i);
    }
    int64_t q = a.v.i / b.v.i, m = a.v.i % b.v.i;
    return integer(q - (m != 0 && (m < 0) != (b.v.i < 0)));
}

static inline reg mod_i(reg a, reg b) {
    if (a.t | b.t) return slow_i(PS_OP_MOD_I, a, b);
    if (b.v.i == 0) return wide(NULL_F);
    if (b.v.i == -1) return integer(0);
    int64_t m = a.v.i % b.v.i;
    return integer(m != 0 && (m < 0) != (b.v.i < 0) ? m + b.v.i : m);
}

static inline reg neg_i(reg a) {
    if (a.t == NULLED) return a;
    if (a.t == WIDE) return wide(-a.v.f);
    return a.v.i == INT64_MIN ? wide(9223372036854775808.0) : integer(-a.v.i);
}

static inline reg abs_i(reg a) {
    if (a.t == WIDE) return wide(fabs(a.v.f));
    return a.t == INT && a.v.i < 0 ? neg_i(a) : a;
}

/* Sign of i - d, exactly; d is no NaN. */
static inline int compare_if(int64_t i, double d) {
    if (d >= 9223372036854775808.0) return -1;
    if (d < -9223372036854775808.0) return 1;
    int64_t whole = (int64_t)d;
    if (i != whole) return i < whole ? -1 : 1;
    double rest = d - (double)whole;
    return rest > 0 ? -1 : rest < 0;
}

/* Sign of a - b, exactly; neither is null. */
static __attribute__((noinline)) int compare_i(reg a, reg b) {
    if (a.t == INT && b.t == INT) return a.v.i < b.v.i ? -1 : a.v.i > b.v.i;
    if (a.t == INT) return compare_if(a.v.i, b.v.f);
    if (b.t == INT) return -compare_if(b.v.i, a.v.f);
    return a.v.f < b.v.f ? -1 : a.v.f > b.v.f;
}

static inline reg min_i(reg a, reg b) {
    if (a.t == NULLED || b.t == NULLED) return wide(NULL_F);
    return compare_i(b, a) < 0 ? b : a;
}

static inline reg max_i(reg a, reg b) {
    if (a.t == NULLED || b.t == NULLED) return wide(NULL_F);
    return compare_i(b, a) > 0 ? b : a;
}

/* ---- strings, by UTF-8 bytes ---- */

static inline int compare_s(const char *a, int64_t na, const char *b, int64_t nb) {
    int order = memcmp(a, b, (size_t)(na < nb ? na : nb));
    return order ? order : na < nb ? -1 : na > nb;
}

/* ---- in (...): binary search in the sorted pool ---- */

static inline int64_t in_f(const double *pool, uint32_t n, double x) {
    if (x != x) return UNKNOWN;
    uint32_t low = 0;
    while (n) {
        uint32_t half = n / 2;
        if (pool[low + half] < x) {
            low += half + 1;
            n -= half + 1;
        } else {
            n = half;
        }
    }
    return pool[low] == x ? TRUE_ : FALSE_; /* the pool ends with a NaN */
}

static inline int64_t in_i(const int64_t *pool, uint32_t n, reg x) {
    if (x.t == NULLED) return UNKNOWN;
    for (uint32_t low = 0; n;) {
        uint32_t half = n / 2;
        int order = compare_i(integer(pool[low + half]), x);
        if (order == 0) return TRUE_;
        if (order < 0) {
            low += half + 1;
            n -= half + 1;
        } else {
            n = half;
        }
    }
    return FALSE_;
}

static inline int64_t in_s(const ps_program *p, const uint64_t *pool, uint32_t n, reg x) {
    if (x.t < 0) return UNKNOWN;
    for (uint32_t low = 0; n;) {
        uint32_t half = n / 2;
        uint64_t u = pool[low + half];
        int order = compare_s(p->text + PS_STR_OFFSET(u), PS_STR_LENGTH(u), x.v.s, x.t);
        if (order == 0) return TRUE_;
        if (order < 0) {
            low += half + 1;
            n -= half + 1;
        } else {
            n = half;
        }
    }
    return FALSE_;
}

/* ---- calendar, UTC, proleptic Gregorian ---- */

static inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); } /* b > 0 */
static inline int64_t floor_mod(int64_t a, int64_t b) { return a % b < 0 ? a % b + b : a % b; }

#define DAY_US 86400000000LL

/* Howard Hinnant, "chrono-compatible low-level date algorithms", civil_from_days; as timestamp.py. */
static reg civil(int op, int64_t us) {
    int64_t days = floor_div(us, DAY_US) + 719468;
    int64_t era = floor_div(days, 146097), in_era = floor_mod(days, 146097);
    int64_t year = (in_era - in_era / 1460 + in_era / 36524 - in_era / 146096) / 365;
    int64_t in_year = in_era - (365 * year + year / 4 - year / 100);
    int64_t month = (5 * in_year + 2) / 153; /* from March */
    if (op == PS_OP_YEAR) return integer(year + era * 400 + (month >= 10));
    if (op == PS_OP_MONTH) return integer(month >= 10 ? month - 9 : month + 3);
    return integer(in_year - (153 * month + 2) / 5 + 1);
}

/* ---- the machine ---- */

static inline reg run(const ps_program *program, const ps_slot *slots, const uint8_t *status, const char *arena) {
    static const void *const LABELS[PS_OP_COUNT] = {
#define X(name) &&L_##name,
        PS_OPCODES(X)
#undef X
    };
    reg r[PS_MAX_REGISTERS];
    const ps_instruction *p = program->code;
    goto *LABELS[p->op];

#define D r[p->dst]
#define A r[p->a]
#define B r[p->b]
#define K p->k
#define NEXT              \
    do {                  \
        p++;              \
        goto *LABELS[p->op]; \
    } while (0)
#define OP(name, statement) \
    L_##name : do {         \
        statement;          \
    }                       \
    while (0);              \
    NEXT;

    OP(LOAD_F, D.v.f = load_f(slots, status, p->a))
    OP(LOAD_I, D = load_i(slots, status, p->a))
    OP(LOAD_B, D.v.i = present(status[p->a]) ? 2 * (slots[p->a].i != 0) : UNKNOWN)
    OP(LOAD_S, D = load_s(slots, status, arena, p->a))
    OP(CONST_F, D.v.f = K.f)
    OP(CONST_I, D.v.i = K.i; D.t = p->a)
    OP(CONST_B, D.v.i = K.i)
    OP(CONST_S, D.v.s = program->text + PS_STR_OFFSET(K.u); D.t = p->a ? -1 : (int64_t)PS_STR_LENGTH(K.u))
    OP(I_TO_F, D.v.f = as_double(A))

    OP(ADD_F, D.v.f = A.v.f + B.v.f)
    OP(SUB_F, D.v.f = A.v.f - B.v.f)
    OP(MUL_F, D.v.f = A.v.f * B.v.f)
    OP(DIV_F, D.v.f = B.v.f == 0 ? NULL_F : A.v.f / B.v.f)
    OP(FLOORDIV_F, D.v.f = floordiv_f(A.v.f, B.v.f))
    OP(MOD_F, D.v.f = mod_f(A.v.f, B.v.f))
    OP(MIN_F, D.v.f = A.v.f != A.v.f || B.v.f != B.v.f ? NULL_F : B.v.f < A.v.f ? B.v.f : A.v.f)
    OP(MAX_F, D.v.f = A.v.f != A.v.f || B.v.f != B.v.f ? NULL_F : B.v.f > A.v.f ? B.v.f : A.v.f)
    OP(NEG_F, D.v.f = -A.v.f)
    OP(ABS_F, D.v.f = fabs(A.v.f))
    OP(FLOOR_F, D.v.f = floor(A.v.f))
    OP(CEIL_F, D.v.f = ceil(A.v.f))
    OP(LOG_F, D.v.f = A.v.f > 0 ? log(A.v.f) : NULL_F)
    OP(EXP_F, D.v.f = exp(A.v.f))
    OP(SQRT_F, D.v.f = A.v.f >= 0 ? sqrt(A.v.f) : NULL_F)

#define CHECKED(name, builtin)                                                                         \
    OP(name, int64_t sum; if ((A.t | B.t) || builtin(A.v.i, B.v.i, &sum)) D = slow_i(PS_OP_##name, A, B); \
       else D = integer(sum))
    CHECKED(ADD_I, __builtin_add_overflow)
    CHECKED(SUB_I, __builtin_sub_overflow)
    CHECKED(MUL_I, __builtin_mul_overflow)
    OP(FLOORDIV_I, D = floordiv_i(A, B))
    OP(MOD_I, D = mod_i(A, B))
    OP(MIN_I, D = min_i(A, B))
    OP(MAX_I, D = max_i(A, B))
    OP(NEG_I, D = neg_i(A))
    OP(ABS_I, D = abs_i(A))

/* Each comparison, from the C operator. x and y are evaluated once. */
#define EACH(M, suffix) \
    M(EQ_##suffix, ==) M(NE_##suffix, !=) M(LT_##suffix, <) M(LE_##suffix, <=) M(GT_##suffix, >) M(GE_##suffix, >=)
#define FLOATS(name, op, left, right) \
    OP(name, double x = left; double y = right; D.v.i = x != x || y != y ? UNKNOWN : 2 * (x op y))
#define F_RR(name, op) FLOATS(name, op, A.v.f, B.v.f)
#define F_RK(name, op) FLOATS(name, op, A.v.f, K.f)
#define F_SK(name, op) FLOATS(name, op, load_f(slots, status, p->a), K.f)
    EACH(F_RR, F_RR)
    EACH(F_RK, F_RK)
    EACH(F_SK, F_SK)
#define INTS(name, op, left, right)                                                      \
    OP(name, reg x = left; reg y = right;                                                \
       if (!(x.t | y.t)) D.v.i = 2 * (x.v.i op y.v.i);                                   \
       else D.v.i = x.t == NULLED || y.t == NULLED ? UNKNOWN : 2 * (compare_i(x, y) op 0))
#define I_RR(name, op) INTS(name, op, A, B)
#define I_RK(name, op) INTS(name, op, A, integer(K.i))
#define I_SK(name, op) INTS(name, op, load_i(slots, status, p->a), integer(K.i))
    EACH(I_RR, I_RR)
    EACH(I_RK, I_RK)
    EACH(I_SK, I_SK)
#define MIXED(name, op)                                                            \
    OP(name, reg x = A; reg y = wide(B.v.f);                                       \
       D.v.i = x.t == NULLED || y.t == NULLED ? UNKNOWN : 2 * (compare_i(x, y) op 0))
    EACH(MIXED, IF_RR)
#define STRINGS(name, op, left, right) \
    OP(name, reg x = left; reg y = right; \
       D.v.i = x.t < 0 || y.t < 0 ? UNKNOWN : 2 * (compare_s(x.v.s, x.t, y.v.s, y.t) op 0))
#define CONSTANT_S ((reg){.v.s = program->text + PS_STR_OFFSET(K.u), .t = PS_STR_LENGTH(K.u)})
#define S_RR(name, op) STRINGS(name, op, A, B)
#define S_RK(name, op) STRINGS(name, op, A, CONSTANT_S)
#define S_SK(name, op) STRINGS(name, op, load_s(slots, status, arena, p->a), CONSTANT_S)
    EACH(S_RR, S_RR)
    EACH(S_RK, S_RK)
    EACH(S_SK, S_SK)
    OP(EQ_B, D.v.i = A.v.i == UNKNOWN || B.v.i == UNKNOWN ? UNKNOWN : 2 * (A.v.i == B.v.i))
    OP(NE_B, D.v.i = A.v.i == UNKNOWN || B.v.i == UNKNOWN ? UNKNOWN : 2 * (A.v.i != B.v.i))

    OP(IN_F, D.v.i = in_f(program->floats + (uint32_t)K.u, (uint32_t)(K.u >> 32), A.v.f))
    OP(IN_I, D.v.i = in_i(program->ints + (uint32_t)K.u, (uint32_t)(K.u >> 32), A))
    OP(IN_S, D.v.i = in_s(program, program->strings + (uint32_t)K.u, (uint32_t)(K.u >> 32), A))

    OP(NOT, D.v.i = 2 - A.v.i)
    OP(AND, D.v.i = A.v.i < B.v.i ? A.v.i : B.v.i)
    OP(OR, D.v.i = A.v.i > B.v.i ? A.v.i : B.v.i)
L_JUMP_FALSE:
    p = A.v.i == FALSE_ ? program->code + K.i : p + 1;
    goto *LABELS[p->op];
L_JUMP_TRUE:
    p = A.v.i == TRUE_ ? program->code + K.i : p + 1;
    goto *LABELS[p->op];

    OP(IS_NULL_F, D.v.i = 2 * (A.v.f != A.v.f))
    OP(IS_NULL_I, D.v.i = 2 * (A.t == NULLED))
    OP(IS_NULL_B, D.v.i = 2 * (A.v.i == UNKNOWN))
    OP(IS_NULL_S, D.v.i = 2 * (A.t < 0))
    OP(COALESCE_F, D = A.v.f != A.v.f ? B : A)
    OP(COALESCE_I, D = A.t == NULLED ? B : A)
    OP(COALESCE_B, D = A.v.i == UNKNOWN ? B : A)
    OP(COALESCE_S, D = A.t < 0 ? B : A)

#define CALENDAR(name, expression) OP(name, reg x = A; D = x.t ? wide(NULL_F) : expression)
    CALENDAR(YEAR, civil(PS_OP_YEAR, x.v.i))
    CALENDAR(MONTH, civil(PS_OP_MONTH, x.v.i))
    CALENDAR(DAY, civil(PS_OP_DAY, x.v.i))
    CALENDAR(HOUR, integer(floor_mod(x.v.i, DAY_US) / 3600000000LL))
    CALENDAR(MINUTE, integer(floor_mod(x.v.i, 3600000000LL) / 60000000LL))
    CALENDAR(SECOND, integer(floor_mod(x.v.i, 60000000LL) / 1000000LL))
    CALENDAR(WEEKDAY, integer(floor_mod(floor_div(x.v.i, DAY_US) + 3, 7))) /* 1970-01-01 was a Thursday */

L_RETURN:
    return r[0];
}

static int test(const ps_program *program, const ps_slot *slots, const uint8_t *status, const char *arena) {
    int64_t truth = run(program, slots, status, arena).v.i;
    return truth == UNKNOWN ? -1 : truth == TRUE_;
}

static void value(const ps_program *program, const ps_slot *slots, const uint8_t *status, const char *arena,
                  ps_slot *out, uint8_t *out_status) {
    reg r = run(program, slots, status, arena);
    int null;
    switch (program->type) {
    case PS_FLOAT64:
        null = r.v.f != r.v.f;
        out->f = null ? NULL_F : r.v.f;
        break;
    case PS_BOOL:
        null = r.v.i == UNKNOWN;
        out->i = r.v.i == TRUE_;
        break;
    default:
        null = r.t == NULLED;
        out->i = null ? 0 : r.v.i;
        *out_status = r.t == WIDE ? PS_PRESENT | PS_WIDE : null ? PS_NULL_VALUE : PS_PRESENT;
        return;
    }
    *out_status = null ? PS_NULL_VALUE : PS_PRESENT;
}

const ps_expression_api ps_expression = {test, value};
