// XXH3, 64 bits: the arithmetic, written from the specification named in xxh3.h.
//
//   0..16 bytes     one formula a class, no state
//   17..240 bytes   16-byte chunks folded into one accumulator
//   241.. bytes     64-byte stripes into 8 lanes, a scramble every 16 stripes (one block)
//
// The seed is 0 everywhere, so the terms that carry it are left out. The loop over whole blocks is
// the only one that matters for speed: portable, AVX2 and AVX-512, chosen at run time.

#include "xxh3.h"

#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nexus {
namespace {

static_assert(std::endian::native == std::endian::little,
              "XXH3 reads little-endian words; this implementation reads native ones.");

constexpr uint64_t kPrime32_1 = 0x9E3779B1U;
constexpr uint64_t kPrime32_2 = 0x85EBCA77U;
constexpr uint64_t kPrime32_3 = 0xC2B2AE3DU;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87ULL;
constexpr uint64_t kPrime64_2 = 0xC2B2AE3D27D4EB4FULL;
constexpr uint64_t kPrime64_3 = 0x165667B19E3779F9ULL;
constexpr uint64_t kPrime64_4 = 0x85EBCA77C2B2AE63ULL;
constexpr uint64_t kPrime64_5 = 0x27D4EB2F165667C5ULL;
constexpr uint64_t kPrimeMix1 = 0x165667919E3779F9ULL;
constexpr uint64_t kPrimeMix2 = 0x9FB21C651E98DF25ULL;

constexpr size_t kSecretBytes = 192;

alignas(64) constexpr uint8_t kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

constexpr size_t kNumLanes = Xxh3::kNumLanes;
constexpr size_t kStripeBytes = Xxh3::kStripeBytes;
constexpr size_t kBlockBytes = Xxh3::kBlockBytes;
constexpr size_t kStripesPerBlock = kBlockBytes / kStripeBytes;
// Each stripe of a block reads the secret 8 bytes further on.
constexpr size_t kSecretStep = sizeof(uint64_t);

// Where each stage reads the secret: offsets of the specification, odd ones included.
constexpr size_t kSecretEmpty = 56;
constexpr size_t kSecret4To8 = 8;
constexpr size_t kSecret9To16 = 24;
constexpr size_t kSecretSecondPass = 3;
constexpr size_t kSecretLastChunk = 119;
constexpr size_t kSecretMerge = 11;
constexpr size_t kSecretScramble = kSecretBytes - kStripeBytes;
constexpr size_t kSecretLastStripe = kSecretBytes - kStripeBytes - 7;

constexpr size_t kChunkBytes = 16;
// The chunks of 129..240 bytes go in two passes with an avalanche between them.
constexpr size_t kFirstPassChunks = 8;
constexpr size_t kMaxMediumBytes = 240;

// One block ahead: about 10 % faster from memory on a Xeon with AVX-512, no slower from cache.
constexpr size_t kPrefetchBytes = kBlockBytes;

using Lanes = Xxh3::Lanes;

constexpr Lanes kInitialLanes = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                                 kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};

template <typename Word>
Word load(const uint8_t* bytes) {
  Word word;
  std::memcpy(&word, bytes, sizeof(word));
  return word;
}

uint64_t secret64(size_t offset) { return load<uint64_t>(kSecret + offset); }

uint64_t multiply_fold(uint64_t a, uint64_t b) {
  __extension__ using Wide = unsigned __int128;
  const Wide product = static_cast<Wide>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t avalanche(uint64_t hash) {
  hash = (hash ^ (hash >> 37)) * kPrimeMix1;
  return hash ^ (hash >> 32);
}

// The finish of the older XXH64, which XXH3 keeps for 0 to 3 bytes.
uint64_t avalanche_xxh64(uint64_t hash) {
  hash = (hash ^ (hash >> 33)) * kPrime64_2;
  hash = (hash ^ (hash >> 29)) * kPrime64_3;
  return hash ^ (hash >> 32);
}

// ---- 0 to 16 bytes ----

uint64_t hash_empty() {
  return avalanche_xxh64(secret64(kSecretEmpty) ^ secret64(kSecretEmpty + 8));
}

uint64_t hash_1_to_3(const uint8_t* data, size_t nbytes) {
  const uint32_t first = data[0];
  const uint32_t middle = data[nbytes / 2];
  const uint32_t last = data[nbytes - 1];
  const uint32_t length = static_cast<uint32_t>(nbytes);
  const uint32_t combined = last | length << 8 | first << 16 | middle << 24;
  const uint32_t key = load<uint32_t>(kSecret) ^ load<uint32_t>(kSecret + 4);
  return avalanche_xxh64(key ^ combined);
}

uint64_t hash_4_to_8(const uint8_t* data, size_t nbytes) {
  const uint64_t first = load<uint32_t>(data);
  const uint64_t last = load<uint32_t>(data + nbytes - 4);
  uint64_t hash = secret64(kSecret4To8) ^ secret64(kSecret4To8 + 8) ^ (last | first << 32);
  hash ^= std::rotl(hash, 49) ^ std::rotl(hash, 24);
  hash *= kPrimeMix2;
  hash ^= (hash >> 35) + nbytes;
  hash *= kPrimeMix2;
  return hash ^ (hash >> 28);
}

uint64_t hash_9_to_16(const uint8_t* data, size_t nbytes) {
  const uint64_t low_key = secret64(kSecret9To16) ^ secret64(kSecret9To16 + 8);
  const uint64_t high_key = secret64(kSecret9To16 + 16) ^ secret64(kSecret9To16 + 24);
  const uint64_t low = low_key ^ load<uint64_t>(data);
  const uint64_t high = high_key ^ load<uint64_t>(data + nbytes - 8);
  return avalanche(nbytes + __builtin_bswap64(low) + high + multiply_fold(low, high));
}

uint64_t hash_small(const uint8_t* data, size_t nbytes) {
  if (nbytes > 8) return hash_9_to_16(data, nbytes);
  if (nbytes > 3) return hash_4_to_8(data, nbytes);
  if (nbytes > 0) return hash_1_to_3(data, nbytes);
  return hash_empty();
}

// ---- 17 to 240 bytes ----

uint64_t mix_chunk(const uint8_t* chunk, size_t secret_offset) {
  return multiply_fold(load<uint64_t>(chunk) ^ secret64(secret_offset),
                       load<uint64_t>(chunk + 8) ^ secret64(secret_offset + 8));
}

// Chunks in pairs, one from each end; the pairs may overlap in the middle.
uint64_t hash_17_to_128(const uint8_t* data, size_t nbytes) {
  const size_t num_pairs = (nbytes - 1) / (2 * kChunkBytes) + 1;
  uint64_t hash = nbytes * kPrime64_1;
  for (size_t i = 0; i < num_pairs; ++i) {
    const size_t offset = i * kChunkBytes;
    hash += mix_chunk(data + offset, 2 * offset);
    hash += mix_chunk(data + nbytes - offset - kChunkBytes, 2 * offset + kChunkBytes);
  }
  return avalanche(hash);
}

uint64_t hash_129_to_240(const uint8_t* data, size_t nbytes) {
  uint64_t hash = nbytes * kPrime64_1;
  for (size_t i = 0; i < kFirstPassChunks; ++i) {
    hash += mix_chunk(data + i * kChunkBytes, i * kChunkBytes);
  }
  hash = avalanche(hash);
  for (size_t i = kFirstPassChunks; i < nbytes / kChunkBytes; ++i) {
    const size_t secret_offset = (i - kFirstPassChunks) * kChunkBytes + kSecretSecondPass;
    hash += mix_chunk(data + i * kChunkBytes, secret_offset);
  }
  hash += mix_chunk(data + nbytes - kChunkBytes, kSecretLastChunk);
  return avalanche(hash);
}

uint64_t hash_up_to_240(const uint8_t* data, size_t nbytes) {
  if (nbytes <= 16) return hash_small(data, nbytes);
  if (nbytes <= 128) return hash_17_to_128(data, nbytes);
  return hash_129_to_240(data, nbytes);
}

// ---- more than 240 bytes ----

void accumulate_stripe(Lanes& lanes, const uint8_t* stripe, const uint8_t* secret) {
  const auto words = load<Lanes>(stripe);
  const auto keys = load<Lanes>(secret);
  for (size_t i = 0; i < kNumLanes; ++i) {
    const uint64_t mixed = words[i] ^ keys[i];
    lanes[i] += words[i ^ 1] + (mixed & 0xFFFFFFFFU) * (mixed >> 32);
  }
}

void scramble(Lanes& lanes) {
  const auto keys = load<Lanes>(kSecret + kSecretScramble);
  for (size_t i = 0; i < kNumLanes; ++i) {
    lanes[i] = (lanes[i] ^ (lanes[i] >> 47) ^ keys[i]) * kPrime32_1;
  }
}

using AccumulateBlock = void (*)(Lanes&, const uint8_t*);

// The reference for the two below.
void accumulate_block_portable(Lanes& lanes, const uint8_t* block) {
  for (size_t n = 0; n < kStripesPerBlock; ++n) {
    accumulate_stripe(lanes, block + n * kStripeBytes, kSecret + n * kSecretStep);
  }
}

#if defined(__x86_64__)

// Zero-masked forms that keep every lane compile to the plain instructions; the plain forms warn
// inside GCC 12's own header (GCC bug 105593).
constexpr __mmask8 kEvery64 = 0xFF;
constexpr __mmask16 kEvery32 = 0xFFFF;

[[gnu::target("avx512f")]] void accumulate_block_avx512(Lanes& lanes, const uint8_t* block) {
  __m512i sum = _mm512_loadu_si512(lanes.data());
  for (size_t n = 0; n < kStripesPerBlock; ++n) {
    const uint8_t* stripe = block + n * kStripeBytes;
    // A hint past the end of the data is harmless.
    _mm_prefetch(stripe + kPrefetchBytes, _MM_HINT_T0);
    const __m512i words = _mm512_loadu_si512(stripe);
    const __m512i keys = _mm512_loadu_si512(kSecret + n * kSecretStep);
    const __m512i mixed = _mm512_xor_si512(words, keys);
    const __m512i high = _mm512_maskz_srli_epi64(kEvery64, mixed, 32);
    const __m512i product = _mm512_maskz_mul_epu32(kEvery64, mixed, high);
    const __m512i swapped = _mm512_maskz_shuffle_epi32(kEvery32, words, _MM_PERM_BADC);
    sum = _mm512_add_epi64(sum, _mm512_add_epi64(product, swapped));
  }
  _mm512_storeu_si512(lanes.data(), sum);
}

// Half a stripe: four lanes.
[[gnu::target("avx2")]] inline __m256i accumulate_half_avx2(__m256i sum, const uint8_t* stripe,
                                                            const uint8_t* secret) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(stripe));
  const __m256i keys = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret));
  const __m256i mixed = _mm256_xor_si256(words, keys);
  const __m256i product = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
  const __m256i swapped = _mm256_shuffle_epi32(words, _MM_SHUFFLE(1, 0, 3, 2));
  return _mm256_add_epi64(sum, _mm256_add_epi64(product, swapped));
}

[[gnu::target("avx2")]] void accumulate_block_avx2(Lanes& lanes, const uint8_t* block) {
  auto* halves = reinterpret_cast<__m256i*>(lanes.data());
  __m256i low = _mm256_loadu_si256(halves);
  __m256i high = _mm256_loadu_si256(halves + 1);
  for (size_t n = 0; n < kStripesPerBlock; ++n) {
    const uint8_t* stripe = block + n * kStripeBytes;
    const uint8_t* secret = kSecret + n * kSecretStep;
    _mm_prefetch(stripe + kPrefetchBytes, _MM_HINT_T0);
    low = accumulate_half_avx2(low, stripe, secret);
    high = accumulate_half_avx2(high, stripe + kStripeBytes / 2, secret + kStripeBytes / 2);
  }
  _mm256_storeu_si256(halves, low);
  _mm256_storeu_si256(halves + 1, high);
}

AccumulateBlock select_accumulate_block() {
  if (__builtin_cpu_supports("avx512f")) return accumulate_block_avx512;
  if (__builtin_cpu_supports("avx2")) return accumulate_block_avx2;
  return accumulate_block_portable;
}

#else

AccumulateBlock select_accumulate_block() { return accumulate_block_portable; }

#endif

void accumulate_blocks(Lanes& lanes, const uint8_t* data, size_t num_blocks) {
  // Chosen at the first call, not at load time: importing the library asks the machine nothing.
  static const AccumulateBlock accumulate_block = select_accumulate_block();
  for (size_t i = 0; i < num_blocks; ++i) {
    accumulate_block(lanes, data + i * kBlockBytes);
    scramble(lanes);
  }
}

// All blocks but the last, which stays even when it is whole.
size_t num_blocks_before_last(size_t nbytes) { return (nbytes - 1) / kBlockBytes; }

uint64_t merge_lanes(const Lanes& lanes, uint64_t total_nbytes) {
  uint64_t hash = total_nbytes * kPrime64_1;
  for (size_t i = 0; i < kNumLanes; i += 2) {
    const size_t offset = kSecretMerge + i * sizeof(uint64_t);
    hash += multiply_fold(lanes[i] ^ secret64(offset), lanes[i + 1] ^ secret64(offset + 8));
  }
  return avalanche(hash);
}

// `block` is the last one, 1 to 1024 bytes. The 64 bytes that end where it ends are the last
// stripe, so in front of a shorter block the bytes that precede it must be readable.
uint64_t finish_long(Lanes lanes, const uint8_t* block, size_t nbytes, uint64_t total_nbytes) {
  const size_t num_stripes = (nbytes - 1) / kStripeBytes;
  for (size_t n = 0; n < num_stripes; ++n) {
    accumulate_stripe(lanes, block + n * kStripeBytes, kSecret + n * kSecretStep);
  }
  accumulate_stripe(lanes, block + nbytes - kStripeBytes, kSecret + kSecretLastStripe);
  return merge_lanes(lanes, total_nbytes);
}

uint64_t hash_long(const uint8_t* data, size_t nbytes) {
  Lanes lanes = kInitialLanes;
  const size_t num_blocks = num_blocks_before_last(nbytes);
  accumulate_blocks(lanes, data, num_blocks);
  const size_t consumed = num_blocks * kBlockBytes;
  return finish_long(lanes, data + consumed, nbytes - consumed, nbytes);
}

}  // namespace

uint64_t xxh3_64(const void* data, size_t nbytes) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  return nbytes <= kMaxMediumBytes ? hash_up_to_240(bytes, nbytes) : hash_long(bytes, nbytes);
}

Xxh3::Xxh3() : lanes_(kInitialLanes) {}

void Xxh3::update(const void* data, size_t nbytes) {
  // memcpy must not see a null pointer, not even for no bytes.
  if (nbytes == 0) return;
  const auto* bytes = static_cast<const uint8_t*>(data);
  total_nbytes_ += nbytes;
  while (nbytes > kBlockBytes - num_pending_) {
    const size_t taken = num_pending_ == 0 ? take_blocks(bytes, nbytes) : complete_pending(bytes);
    bytes += taken;
    nbytes -= taken;
  }
  std::memcpy(pending() + num_pending_, bytes, nbytes);
  num_pending_ += nbytes;
}

uint64_t Xxh3::digest() const {
  if (total_nbytes_ <= kMaxMediumBytes) return hash_up_to_240(pending(), num_pending_);
  return finish_long(lanes_, pending(), num_pending_, total_nbytes_);
}

size_t Xxh3::take_blocks(const uint8_t* data, size_t nbytes) {
  const size_t num_blocks = num_blocks_before_last(nbytes);
  const size_t taken = num_blocks * kBlockBytes;
  accumulate_blocks(lanes_, data, num_blocks);
  remember_stripe_before(data + taken);
  return taken;
}

size_t Xxh3::complete_pending(const uint8_t* data) {
  const size_t taken = kBlockBytes - num_pending_;
  std::memcpy(pending() + num_pending_, data, taken);
  accumulate_blocks(lanes_, pending(), 1);
  remember_stripe_before(pending() + kBlockBytes);
  num_pending_ = 0;
  return taken;
}

void Xxh3::remember_stripe_before(const uint8_t* end) {
  std::memcpy(buffer_.data(), end - kStripeBytes, kStripeBytes);
}

}  // namespace nexus
