// AMX: tiles of 16 rows of 64 bytes, and who has them.

#pragma once

#include <cstddef>
#include <cstdint>

#include "numbers.hpp"

#if OUTRIDER_X86 && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#include <sys/syscall.h>
#include <unistd.h>
#define OUTRIDER_AMX 1

namespace outrider {

// On every processor that has AMX.
#define AMX_AND "amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,popcnt,fma"

struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

inline bool has_amx() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!has_avx512_bf16()) return false;
    if (!__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("avx512vbmi2")) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // AMX-BF16 and AMX-TILE
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // Linux lends tiles on demand only
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

}  // namespace outrider
#endif
