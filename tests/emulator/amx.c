/* AMX for a CPU that has none: instructions of tiles end in SIGILL there, and are done here.
 *
 * What they do is written from Intel's Architecture Instruction Set Extensions Programming Reference, chapter 3. Only
 * what lexibit's kernels may use is there; whatever else is illegal, wrongly configured tiles too, ends the process as
 * it would without this.
 *
 * cc -O3 -mavx2 -mfma -shared -fPIC amx.c -o amx.so; then load it: it takes the signal at once.
 */
#define _GNU_SOURCE
#include <math.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>
#include <xmmintrin.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64 };

typedef struct {
  uint8_t palette, start, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} Configuration;

/* What all threads did: products, and how many have tiles now. For tests that ask for it. */
_Atomic long lexibit_amx_products, lexibit_amx_configured;

static __thread Configuration configuration; /* palette 0: none */
static __thread uint8_t tile[TILES][ROWS][ROW_BYTES];

static bool valid(const Configuration* c) {
  if (c->palette != 1 || c->start) return false;
  for (int i = 0; i < 14; ++i)
    if (c->reserved[i]) return false;
  for (int i = 0; i < 16; ++i) {
    if (i >= TILES && (c->row_bytes[i] || c->rows[i])) return false;
    if (c->row_bytes[i] > ROW_BYTES || c->rows[i] > ROWS || c->row_bytes[i] % 4) return false;
    if (!c->row_bytes[i] != !c->rows[i]) return false;
  }
  return true;
}

static bool there(int t) { return configuration.palette && t < TILES && configuration.rows[t]; }

/* C, A and B have shapes that go together. */
static bool fit(int c, int a, int b) {
  return c != a && c != b && a != b && there(c) && there(a) && there(b) &&
         configuration.rows[c] == configuration.rows[a] && configuration.row_bytes[c] == configuration.row_bytes[b] &&
         configuration.row_bytes[a] == 4 * configuration.rows[b];
}

/* What a byte means: one of unsigned ones, or of signed ones. */
static int byte_of(uint8_t value, bool is_signed) { return is_signed ? (int8_t)value : value; }

static bool multiply_bytes(int c, int a, int b, bool a_signed, bool b_signed) {
  if (!fit(c, a, b)) return false;
  ++lexibit_amx_products;
  for (int m = 0; m < configuration.rows[c]; ++m) {
    uint32_t sum[ROWS];
    memcpy(sum, tile[c][m], sizeof sum);
    for (int k = 0; k < configuration.rows[b]; ++k)
      for (int i = 0; i < 4; ++i) {
        const int of_a = byte_of(tile[a][m][4 * k + i], a_signed);
        for (int n = 0; n < configuration.row_bytes[c] / 4; ++n)
          sum[n] += (uint32_t)(of_a * byte_of(tile[b][k][4 * n + i], b_signed));
      }
    memcpy(tile[c][m], sum, sizeof sum);
  }
  return true;
}

static float float_of(const uint8_t* half) {
  const uint32_t bits = (uint32_t)half[1] << 24 | (uint32_t)half[0] << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

/* Even and odd columns are added up apart, with one rounding for a product and its addition. */
static bool multiply_halves(int c, int a, int b) {
  if (!fit(c, a, b)) return false;
  ++lexibit_amx_products;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x1F80 | 0x8040); /* to nearest; denormals are zero, and become zero */
  for (int m = 0; m < configuration.rows[c]; ++m)
    for (int n = 0; n < configuration.row_bytes[c] / 4; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < configuration.rows[b]; ++k) {
        even = fmaf(float_of(tile[a][m] + 4 * k), float_of(tile[b][k] + 4 * n), even);
        odd = fmaf(float_of(tile[a][m] + 4 * k + 2), float_of(tile[b][k] + 4 * n + 2), odd);
      }
      memcpy(&sum, tile[c][m] + 4 * n, 4);
      sum += even + odd;
      memcpy(tile[c][m] + 4 * n, &sum, 4);
    }
  _mm_setcsr(before);
  return true;
}

/* One instruction: its bytes from the prefix on, and the registers it sees. */
typedef struct {
  const uint8_t* byte;
  const greg_t* registers;
  int length;
} Instruction;

static uint64_t general(const Instruction* in, int number) {
  static const int place[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return (uint64_t)in->registers[place[number]];
}

/* The memory that ModRM means, and the stride if the operand is a tile in memory; counts the instruction's bytes. */
static bool memory(Instruction* in, bool strided, uint8_t** base, int64_t* stride) {
  const uint8_t modrm = in->byte[4];
  const int mode = modrm >> 6, x = !(in->byte[1] >> 6 & 1), b = !(in->byte[1] >> 5 & 1);
  int at = 5, number = (modrm & 7) | b << 3;
  uint64_t address = 0;
  *stride = 0;
  if ((modrm & 7) == 4) {
    const uint8_t sib = in->byte[at++];
    const int index = (sib >> 3 & 7) | x << 3;
    number = (sib & 7) | b << 3;
    const int64_t scaled = index == 4 ? 0 : (int64_t)(general(in, index) << (sib >> 6));
    if (strided)
      *stride = scaled;
    else
      address += (uint64_t)scaled;
  } else if (strided) {
    return false;
  }
  int32_t wide = 0;
  if (mode == 0 && (number & 7) == 5) {
    /* no base: an address as it is behind SIB, else one that counts from the next instruction */
    memcpy(&wide, in->byte + at, 4), at += 4;
    in->length = at;
    address += (uint64_t)(int64_t)wide + ((modrm & 7) == 4 ? 0 : (uint64_t)(uintptr_t)in->byte + (uint64_t)at);
  } else {
    if (mode == 1) wide = (int8_t)in->byte[at++];
    if (mode == 2) memcpy(&wide, in->byte + at, 4), at += 4;
    in->length = at;
    address += general(in, number) + (uint64_t)(int64_t)wide;
  }
  *base = (uint8_t*)(uintptr_t)address;
  return true;
}

static bool load(int t, const uint8_t* from, int64_t stride) {
  if (!there(t)) return false;
  memset(tile[t], 0, sizeof tile[t]);
  for (int row = 0; row < configuration.rows[t]; ++row) memcpy(tile[t][row], from + row * stride, configuration.row_bytes[t]);
  return true;
}

static bool store(int t, uint8_t* to, int64_t stride) {
  if (!there(t)) return false;
  for (int row = 0; row < configuration.rows[t]; ++row) memcpy(to + row * stride, tile[t][row], configuration.row_bytes[t]);
  return true;
}

/* Does what stands there, if it is of tiles: false if it is not, or is not allowed. */
static bool emulate(Instruction* in) {
  if (in->byte[0] != 0xC4 || (in->byte[1] & 0x1F) != 2) return false; /* VEX.0F38 */
  if (in->byte[2] & 0x84) return false;                               /* W0, 128 bits */
  if (in->byte[3] < 0x50 && (in->byte[2] & 0x78) != 0x78) return false; /* a third register that there is not */
  const int prefix = in->byte[2] & 3, opcode = in->byte[3], modrm = in->byte[4]; /* none, 66, F3, F2 */
  const int third = ~(in->byte[2] >> 3) & 15, first = modrm >> 3 & 7, second = modrm & 7;
  const bool of_registers = modrm >> 6 == 3;
  uint8_t* base;
  int64_t stride;
  in->length = 5;
  switch (opcode) {
    case 0x49:
      if (of_registers && prefix == 0 && modrm == 0xC0) {
        if (configuration.palette) --lexibit_amx_configured;
        memset(&configuration, 0, sizeof configuration), memset(tile, 0, sizeof tile);
        return true;
      }
      if (of_registers && prefix == 3 && second == 0) return there(first) && memset(tile[first], 0, sizeof tile[first]);
      if (of_registers || prefix != 0 || first != 0 || !memory(in, false, &base, &stride)) return false;
      if (!configuration.palette) ++lexibit_amx_configured;
      memcpy(&configuration, base, sizeof configuration), memset(tile, 0, sizeof tile);
      return valid(&configuration);
    case 0x4B:
      if (of_registers || prefix == 0 || !memory(in, true, &base, &stride)) return false;
      return prefix == 2 ? store(first, base, stride) : load(first, base, stride);
    case 0x5C:
      return of_registers && prefix == 2 && multiply_halves(first, second, third);
    case 0x5E:
      return of_registers && multiply_bytes(first, second, third, prefix >= 2, prefix == 1 || prefix == 3);
  }
  return false;
}

static void illegal(int number, siginfo_t* info, void* context) {
  (void)info;
  greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  Instruction in = {(const uint8_t*)(uintptr_t)registers[REG_RIP], registers, 0};
  if (emulate(&in))
    registers[REG_RIP] += in.length;
  else
    signal(number, SIG_DFL); /* again, and to the end */
}

__attribute__((constructor)) static void begin(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = illegal;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, NULL);
}
