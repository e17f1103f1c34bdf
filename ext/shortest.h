/* shortest.h (hot path): a double as the shortest decimal that reads back as the same double, as Python's repr writes it.
 *
 * Schubfach (Raffaello Giulietti, "The Schubfach way to render doubles", 2021): one multiplication by a power of ten, of
 * which 128 bits are enough, gives the interval of decimals that round to the double; the shortest in it is the answer.
 * The table of powers is made once, by ps_shortest_set. What must stay true: the digits are repr's, for every double.
 */
#ifndef PENSTOCK_SHORTEST_H
#define PENSTOCK_SHORTEST_H

#include <stdint.h>
#include <string.h>

#define PS_POWER_MIN (-292)
#define PS_POWER_MAX 324
#define PS_SHORTEST_ROOM 32 /* no text is longer */

/* 10^k for k from PS_POWER_MIN on, scaled to 128 bits with the highest one set, rounded up: high, low. */
static uint64_t ps_powers[PS_POWER_MAX - PS_POWER_MIN + 1][2];

static void ps_shortest_set(int k, uint64_t high, uint64_t low) {
    ps_powers[k - PS_POWER_MIN][0] = high;
    ps_powers[k - PS_POWER_MIN][1] = low;
}

/* The product's high 64 bits, the lowest of them set where anything below it is. */
static inline uint64_t ps_round_to_odd(const uint64_t *g, uint64_t c) {
    const unsigned __int128 low = (unsigned __int128)g[1] * c;
    const unsigned __int128 sum = (unsigned __int128)g[0] * c + (uint64_t)(low >> 64);
    return (uint64_t)(sum >> 64) | ((uint64_t)sum > 1);
}

/* The shortest decimal, digits * 10^*exponent, that is nearer to c * 2^q than to its neighbours; c is above zero.
 * closer: the neighbour below is half as far. */
static inline uint64_t ps_shortest_between(uint64_t c, int q, int closer, int *exponent) {
    const uint64_t odd = c & 1;
    const int k = (q * 1262611 - (closer ? 524031 : 0)) >> 22;
    const int h = q + ((-k * 1741647) >> 19) + 1;
    const uint64_t *g = ps_powers[-k - PS_POWER_MIN];
    const uint64_t lower = ps_round_to_odd(g, (4 * c - 2 + closer) << h) + odd;
    const uint64_t middle = ps_round_to_odd(g, 4 * c << h);
    const uint64_t upper = ps_round_to_odd(g, (4 * c + 2) << h) - odd;
    const uint64_t s = middle / 4;
    if (s >= 10) {
        const uint64_t tens = s / 10;
        const int below = lower <= 40 * tens, above = 40 * tens + 40 <= upper;
        if (below != above) {
            *exponent = k + 1;
            return tens + above;
        }
    }
    const int below = lower <= 4 * s, above = 4 * s + 4 <= upper;
    *exponent = k;
    if (below != above)
        return s + above;
    return s + (middle > 4 * s + 2 || (middle == 4 * s + 2 && (s & 1)));
}

/* digits * 10^exponent as repr writes it; digits may be zero. */
static inline int ps_shortest_text(int negative, uint64_t digits, int exponent, char *out) {
    char text[24] = "";
    int n = 0, point, at = 0;
    if (negative)
        out[at++] = '-';
    if (digits == 0) {
        memcpy(out + at, "0.0", 3);
        return at + 3;
    }
    while (digits % 10 == 0) {
        digits /= 10;
        exponent++;
    }
    for (uint64_t rest = digits; rest; rest /= 10)
        n++;
    for (int i = n; i; digits /= 10)
        text[--i] = (char)('0' + digits % 10);
    point = n + exponent; /* the point stands after this many digits */
    if (point > 16 || point < -3) {
        int e = point - 1;
        out[at++] = text[0];
        if (n > 1) {
            out[at++] = '.';
            memcpy(out + at, text + 1, (size_t)n - 1);
            at += n - 1;
        }
        out[at++] = 'e';
        out[at++] = e < 0 ? '-' : '+';
        if (e < 0)
            e = -e;
        if (e >= 100)
            out[at++] = (char)('0' + e / 100);
        out[at++] = (char)('0' + e / 10 % 10);
        out[at++] = (char)('0' + e % 10);
    } else if (point <= 0) {
        memcpy(out + at, "0.000", 5);
        at += 2 - point;
        memcpy(out + at, text, (size_t)n);
        at += n;
    } else if (point >= n) {
        memcpy(out + at, text, (size_t)n);
        memset(out + at + n, '0', (size_t)(point - n));
        at += point;
        memcpy(out + at, ".0", 2);
        at += 2;
    } else {
        memcpy(out + at, text, (size_t)point);
        out[at + point] = '.';
        memcpy(out + at + point + 1, text + point, (size_t)(n - point));
        at += n + 1;
    }
    return at;
}

/* Writes at most PS_SHORTEST_ROOM characters, no terminator; returns how many. Not finite: null. */
static int ps_shortest(double value, char *out) {
    uint64_t bits;
    memcpy(&bits, &value, 8);
    const uint64_t fraction = bits & ((UINT64_C(1) << 52) - 1);
    const int biased = (int)(bits >> 52 & 2047);
    int exponent = 0;
    uint64_t digits = 0;
    if (biased == 2047) {
        memcpy(out, "null", 4);
        return 4;
    }
    if (biased || fraction)
        digits = ps_shortest_between(biased ? fraction | UINT64_C(1) << 52 : fraction, (biased ? biased : 1) - 1075,
                                     fraction == 0 && biased > 1, &exponent);
    return ps_shortest_text((int)(bits >> 63), digits, exponent, out);
}

/* The same for a float: the shortest decimal that reads back as the same float. */
static int ps_shortest32(float value, char *out) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint32_t fraction = bits & ((UINT32_C(1) << 23) - 1);
    const int biased = (int)(bits >> 23 & 255);
    int exponent = 0;
    uint64_t digits = 0;
    if (biased == 255) {
        memcpy(out, "null", 4);
        return 4;
    }
    if (biased || fraction)
        digits = ps_shortest_between(biased ? fraction | UINT32_C(1) << 23 : fraction, (biased ? biased : 1) - 150,
                                     fraction == 0 && biased > 1, &exponent);
    return ps_shortest_text((int)(bits >> 31), digits, exponent, out);
}

#endif
