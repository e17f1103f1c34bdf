/* exact_sum.h (hot path): exact sums of doubles and integers, with exact add and subtract, rounded once on read.
 *
 * A sum is a two's complement integer of `limbs` 64-bit limbs times 2^base. All sums of one lane (the running total and
 * what each window has evicted) share base and limbs, so a window is a plain integer difference. A lane starts with two
 * limbs (four for squares), based on its first value; a value outside its range widens the lane exactly. Headroom above
 * the largest admitted value holds 2^24 terms while narrow, 2^40 once wide, so adding never overflows.
 * What must stay true: the rounded result depends only on the multiset that was added, never on base, limbs or order.
 *
 * Zero: the sign of zero is not kept; an exact sum of zero is +0.0, also when every term was -0.0.
 * Rounding: to nearest, ties to even, subnormals included; beyond the largest double the result is an infinity.
 */
#ifndef PENSTOCK_EXACT_SUM_H
#define PENSTOCK_EXACT_SUM_H

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef unsigned __int128 ps_u128;
typedef __int128 ps_i128;

enum {
    PS_NARROW_HEADROOM = 24,
    PS_WIDE_HEADROOM = 40,
    PS_SUM_INLINE = 2,     /* limbs of a narrow sum */
    PS_SQUARE_INLINE = 4,  /* limbs of a narrow sum of squares */
    PS_MAX_LIMBS = 72,     /* 67 hold any sum of squares of doubles with headroom; the rest is slack for a temporary */
};

typedef struct {
    int16_t base;    /* weight of the lowest bit, as a power of two */
    uint16_t limbs;  /* 0: nothing but zeros were added so far */
    uint32_t ref;    /* where the limbs are once they no longer fit inline; 0 while inline */
} ps_lane;

/* One addend: magnitude * 2^exponent, negative or not. `width` bounds the bits of magnitude (53, 106, 64, 128). */
typedef struct {
    ps_u128 magnitude;
    int exponent;
    int negative;
} ps_term;

static inline uint64_t ps_double_bits(double x) { uint64_t u; memcpy(&u, &x, 8); return u; }
static inline double ps_bits_double(uint64_t u) { double x; memcpy(&x, &u, 8); return x; }

/* x finite. */
static inline ps_term ps_term_of_double(uint64_t bits) {
    int e = (int)(bits >> 52) & 0x7ff;
    uint64_t m = (bits & 0xfffffffffffffULL) | ((uint64_t)(e != 0) << 52);
    ps_term t = {m, e - 1075 + (e == 0), (int)(bits >> 63)};
    return t;
}

static inline ps_term ps_term_of_int(int64_t v) {
    uint64_t m = v < 0 ? 0 - (uint64_t)v : (uint64_t)v;
    ps_term t = {m, 0, v < 0};
    return t;
}

static inline ps_term ps_term_squared(ps_term t) {
    uint64_t m = (uint64_t)t.magnitude;
    ps_term s = {(ps_u128)m * m, 2 * t.exponent, 0};
    return s;
}

static inline int ps_u128_top(ps_u128 m) { /* index of the highest set bit; m != 0 */
    uint64_t h = (uint64_t)(m >> 64);
    return h ? 127 - __builtin_clzll(h) : 63 - __builtin_clzll((uint64_t)m);
}

static inline int ps_u128_bottom(ps_u128 m) { /* index of the lowest set bit; m != 0 */
    uint64_t l = (uint64_t)m;
    return l ? __builtin_ctzll(l) : 64 + __builtin_ctzll((uint64_t)(m >> 64));
}

/* Bits above base that a term may reach. */
static inline int ps_lane_capacity(int limbs, int narrow) {
    return 64 * limbs - 1 - (narrow ? PS_NARROW_HEADROOM : PS_WIDE_HEADROOM);
}

/* True if the term can be added to a lane of this form. */
static inline int ps_lane_fits(int base, int limbs, int narrow, ps_term t) {
    if (t.magnitude == 0) return 1;
    if (limbs == 0) return 0;
    return t.exponent + ps_u128_bottom(t.magnitude) >= base
        && t.exponent + ps_u128_top(t.magnitude) < base + ps_lane_capacity(limbs, narrow);
}

/* acc += or -= term, modulo 2^(64 limbs); the term fits the lane. */
static inline void ps_limbs_add(uint64_t *acc, int limbs, int base, ps_term t, int subtract) {
    int shift = t.exponent - base, negative = t.negative ^ subtract;
    ps_u128 m = t.magnitude;
    if (shift < 0) { /* the bits that go are zeros, or the term is zero */
        m = shift <= -128 ? 0 : m >> -shift;
        shift = 0;
    }
    if (limbs == 2) {
        ps_u128 a, v = shift < 128 ? m << shift : 0;
        memcpy(&a, acc, 16);
        a = negative ? a - v : a + v;
        memcpy(acc, &a, 16);
        return;
    }
    int word = shift >> 6, bit = shift & 63;
    uint64_t piece[3];
    piece[0] = (uint64_t)m << bit;
    piece[1] = bit ? (uint64_t)(m >> (64 - bit)) : (uint64_t)(m >> 64);
    piece[2] = bit ? (uint64_t)(m >> 64) >> (64 - bit) : 0;
    unsigned char carry = 0;
    for (int i = word, p = 0; i < limbs; i++, p++) {
        uint64_t v = p < 3 ? piece[p] : 0;
        if (p >= 3 && !carry) break;
        uint64_t r;
        if (negative) {
            unsigned char c1 = __builtin_sub_overflow(acc[i], v, &r);
            unsigned char c2 = __builtin_sub_overflow(r, (uint64_t)carry, &acc[i]);
            carry = c1 | c2;
        } else {
            unsigned char c1 = __builtin_add_overflow(acc[i], v, &r);
            unsigned char c2 = __builtin_add_overflow(r, (uint64_t)carry, &acc[i]);
            carry = c1 | c2;
        }
    }
}

/* acc += or -= other, both of `limbs` limbs and one base. */
static inline void ps_limbs_combine(uint64_t *acc, const uint64_t *other, int limbs, int subtract) {
    if (limbs == 2) {
        ps_u128 a, b;
        memcpy(&a, acc, 16);
        memcpy(&b, other, 16);
        a = subtract ? a - b : a + b;
        memcpy(acc, &a, 16);
        return;
    }
    unsigned char carry = 0;
    for (int i = 0; i < limbs; i++) {
        uint64_t r;
        if (subtract) {
            unsigned char c1 = __builtin_sub_overflow(acc[i], other[i], &r);
            unsigned char c2 = __builtin_sub_overflow(r, (uint64_t)carry, &acc[i]);
            carry = c1 | c2;
        } else {
            unsigned char c1 = __builtin_add_overflow(acc[i], other[i], &r);
            unsigned char c2 = __builtin_add_overflow(r, (uint64_t)carry, &acc[i]);
            carry = c1 | c2;
        }
    }
}

/* to = from * 2^shift, sign extended; to has at least as many limbs as needed. */
static inline void ps_limbs_widen(uint64_t *to, int to_limbs, const uint64_t *from, int from_limbs, int shift) {
    uint64_t sign = (uint64_t)((int64_t)from[from_limbs - 1] >> 63);
    int word = shift >> 6, bit = shift & 63;
    for (int i = to_limbs - 1; i >= 0; i--) {
        int j = i - word;
        uint64_t hi = j < 0 ? 0 : j < from_limbs ? from[j] : sign;
        uint64_t lo = j - 1 < 0 ? 0 : j - 1 < from_limbs ? from[j - 1] : sign;
        to[i] = bit ? (hi << bit) | (lo >> (64 - bit)) : hi;
    }
}

/* The form a lane takes so that the term fits too. `square` is 1 for sums of squares. Returns limbs, sets base. */
static inline int ps_lane_form(const ps_lane *lane, int narrow, int square, ps_term t, int *base, int *is_narrow) {
    int floor_exponent = square ? -2148 : -1074;
    int low = t.exponent + ps_u128_bottom(t.magnitude), high = t.exponent + ps_u128_top(t.magnitude) + 1;
    if (lane->limbs == 0) {
        int width = square ? 106 : 53, limbs = square ? PS_SQUARE_INLINE : PS_SUM_INLINE;
        int b = high - width - (ps_lane_capacity(limbs, 1) - width) / 2;
        *base = b < floor_exponent ? floor_exponent : b;
        *is_narrow = 1;
        return limbs;
    }
    int top = lane->base + ps_lane_capacity(lane->limbs, narrow), b = lane->base;
    if (high > top) top = high;
    if (low < b) b = low - 32 < floor_exponent ? floor_exponent : low - 32;
    *base = b;
    *is_narrow = 0;
    return (top - b + 1 + PS_WIDE_HEADROOM + 63) / 64;
}

/* A magnitude with a sign: what a window's exact sum is turned into before it is rounded. */
typedef struct {
    int base, limbs, negative, top; /* top: highest set bit, -1 for zero */
    uint64_t limb[PS_MAX_LIMBS];
} ps_big;

static inline void ps_big_normalize(ps_big *b) { /* limb[] in two's complement on entry, magnitude on return */
    b->negative = (int)(b->limb[b->limbs - 1] >> 63);
    if (b->negative) {
        unsigned char carry = 1;
        for (int i = 0; i < b->limbs; i++) {
            uint64_t r;
            carry = __builtin_add_overflow(~b->limb[i], (uint64_t)carry, &r);
            b->limb[i] = r;
        }
    }
    b->top = -1;
    for (int i = b->limbs - 1; i >= 0; i--)
        if (b->limb[i]) {
            b->top = 64 * i + 63 - __builtin_clzll(b->limb[i]);
            break;
        }
}

static inline uint64_t ps_big_bits(const ps_big *b, int from) { /* 64 bits of the magnitude, starting at bit `from` */
    int word = from >> 6, bit = from & 63;
    uint64_t lo = word >= 0 && word < b->limbs ? b->limb[word] : 0;
    uint64_t hi = word + 1 >= 0 && word + 1 < b->limbs ? b->limb[word + 1] : 0;
    return bit ? (lo >> bit) | (hi << (64 - bit)) : lo;
}

/* m in [2^52, 2^53] (or below at q = -1074) times 2^q. */
static inline double ps_pack_double(uint64_t m, int q, int negative) {
    uint64_t bits = q > 971 ? 0x7ff0000000000000ULL : ((uint64_t)(q + 1074) << 52) + m;
    return ps_bits_double(bits | (uint64_t)negative << 63);
}

/* |b| * 2^(base - scale) rounded to nearest even, with its sign; *m and *drop give the integer that was kept. */
static inline double ps_big_round(const ps_big *b, int scale, uint64_t *kept, int *dropped) {
    *kept = 0;
    *dropped = 0;
    if (b->top < 0) return 0.0;
    int base = b->base - scale, q = b->top + base - 52;
    if (q < -1074) q = -1074;
    int drop = q - base;
    uint64_t m;
    if (drop <= 0) {
        m = ps_big_bits(b, 0) << -drop; /* top + 1 - drop <= 53 bits */
    } else {
        if (drop > b->top + 1) return 0.0;
        m = drop > b->top ? 0 : ps_big_bits(b, drop);
        int word = (drop - 1) >> 6, bit = (drop - 1) & 63;
        int half = (int)(b->limb[word] >> bit) & 1;
        if (half) {
            int sticky = (b->limb[word] & (((uint64_t)1 << bit) - 1)) != 0;
            for (int i = 0; i < word && !sticky; i++) sticky = b->limb[i] != 0;
            m += sticky | (int)(m & 1);
        }
    }
    *kept = m;
    *dropped = drop;
    return m == 0 ? 0.0 : ps_pack_double(m, q, b->negative);
}

/* A two-limb sum rounded to a double (the common case of the above). */
static inline double ps_i128_round(ps_i128 v, int base) {
    uint64_t sign = (uint64_t)(v >> 127);
    ps_u128 mag = ((ps_u128)v ^ (ps_u128)(ps_i128)(int64_t)sign) + (sign & 1);
    if (mag == 0) return 0.0;
    int top = ps_u128_top(mag), q = top + base - 52;
    if (__builtin_expect(q >= -1074 && q <= 970, 1)) { /* neither subnormal nor near overflow */
        mag <<= 127 - top;
        uint64_t high = (uint64_t)(mag >> 64), low = (uint64_t)mag;
        uint64_t m = high >> 11, rest = (high & 0x7ff) | (low != 0);
        m += (rest + (m & 1)) > 0x400; /* above half, or half and odd; rest counts a fraction of 0x800 */
        return ps_bits_double((((uint64_t)(q + 1074) << 52) + m) | (sign & 0x8000000000000000ULL));
    }
    if (q < -1074) q = -1074;
    int drop = q - base;
    if (drop <= 0) return ps_pack_double((uint64_t)mag << -drop, q, (int)(sign & 1));
    uint64_t m = (uint64_t)(mag >> drop);
    ps_u128 rest = mag & (((ps_u128)1 << drop) - 1), half = (ps_u128)1 << (drop - 1);
    m += rest > half || (rest == half && (m & 1));
    return ps_pack_double(m, q, (int)(sign & 1));
}

/* to = |a| * 2^shift, in so many limbs. */
static inline void ps_big_place(const ps_big *a, int shift, uint64_t *to, int limbs) {
    int word = shift >> 6, bit = shift & 63, used = a->top < 0 ? 0 : (a->top >> 6) + 1;
    memset(to, 0, 8u * (unsigned)limbs);
    for (int i = 0; i < used && i + word < limbs; i++) {
        to[i + word] |= a->limb[i] << bit;
        if (bit && i + word + 1 < limbs) to[i + word + 1] |= a->limb[i] >> (64 - bit);
    }
}

/* Variance of n >= 1 values from their exact sum and exact sum of squares (S13): the numerator n Sxx - Sx Sx exactly,
 * rounded once to 53 bits, then divided by n * (n - ddof) as a double. Never below 0, and 0 for a constant. */
static inline double ps_variance(const ps_big *sx, const ps_big *sxx, uint64_t n, uint64_t ddof) {
    enum { LIMBS = 2 * PS_MAX_LIMBS + 4 };
    if (sxx->top < 0) return 0.0;
    ps_big numerator;
    uint64_t square[LIMBS], placed[LIMBS];
    int used = sx->top < 0 ? 0 : (sx->top >> 6) + 1;
    int base = sxx->base < 2 * sx->base ? sxx->base : 2 * sx->base;
    int high = sxx->top + sxx->base + 64, high_square = 2 * (sx->top + 1 + sx->base);
    int limbs = ((high > high_square ? high : high_square) - base + 64) / 64 + 1;
    memset(square, 0, sizeof square);
    for (int i = 0; i < used; i++) { /* Sx Sx */
        uint64_t carry = 0;
        for (int j = 0; j < used; j++) {
            ps_u128 t = (ps_u128)sx->limb[i] * sx->limb[j] + square[i + j] + carry;
            square[i + j] = (uint64_t)t;
            carry = (uint64_t)(t >> 64);
        }
        square[i + used] = carry;
    }
    ps_big_place(sxx, sxx->base - base, placed, limbs);
    uint64_t carry = 0;
    for (int i = 0; i < limbs; i++) { /* n Sxx */
        ps_u128 t = (ps_u128)placed[i] * n + carry;
        placed[i] = (uint64_t)t;
        carry = (uint64_t)(t >> 64);
    }
    int word = (2 * sx->base - base) >> 6, bit = (2 * sx->base - base) & 63;
    unsigned char borrow = 0;
    for (int i = 0; i < limbs; i++) {
        int j = i - word;
        uint64_t lo = j - 1 >= 0 && j - 1 < 2 * used ? square[j - 1] : 0, at = j >= 0 && j < 2 * used ? square[j] : 0;
        uint64_t part = bit ? at << bit | lo >> (64 - bit) : at, r;
        unsigned char b = __builtin_sub_overflow(placed[i], part, &r);
        b |= __builtin_sub_overflow(r, (uint64_t)borrow, &r);
        placed[i] = r;
        borrow = b;
    }
    int top = limbs - 1;
    while (top >= 0 && !placed[top]) top--;
    if (top < 0) return 0.0;
    int first = 0; /* zeros below are not kept: the rest fits what a sum of squares takes, or is rounded from its top */
    while (!placed[first]) first++;
    int sticky = 0;
    if (top - first + 1 > PS_MAX_LIMBS) {
        sticky = 1;
        first = top - PS_MAX_LIMBS + 1;
    }
    numerator.base = 0;
    numerator.limbs = top - first + 1;
    numerator.negative = 0;
    memcpy(numerator.limb, placed + first, 8u * (unsigned)numerator.limbs);
    numerator.limb[0] |= (uint64_t)sticky;
    numerator.top = 64 * (numerator.limbs - 1) + 63 - __builtin_clzll(numerator.limb[numerator.limbs - 1]);
    /* rounded as if a double had no end of its exponents, so that only the variance itself can be out of range */
    uint64_t kept;
    int dropped, scale = numerator.top;
    double rounded = ps_big_round(&numerator, scale, &kept, &dropped);
    ps_u128 divisor = (ps_u128)n * (n - ddof);
    return ldexp(rounded / (double)divisor, scale + base + 64 * first);
}

#endif
