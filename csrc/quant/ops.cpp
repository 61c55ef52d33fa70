// The thin glue between torch's stable ABI and the kernels for packed weights, on CPUs. Schemas:
// csrc/library.cpp. Fakes, gradients, other devices: nexus_ext/quant/registration.py.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#pragma GCC diagnostic pop

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/align.h"
#include "common/error.h"
#include "common/range.h"
#include "common/recycler.h"
#include "quant/encode.h"
#include "quant/ggml.h"
#include "quant/linear.h"
#include "quant/packed.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace nexus {
namespace {

using Ints = std::vector<int64_t>;

// Results from here on are worth recycling: allocators give such blocks back to the kernel.
constexpr int64_t kLargeBytes = 1 << 20;
// A result beyond this does not stay in a core's cache until it is read.
constexpr int64_t kPastCacheBytes = 16 << 20;
// A thread's share, in elements, below which waking another one does not pay.
constexpr int64_t kGrain = 1 << 15;

// --- checks -------------------------------------------------------------------------------------

template <typename... Parts>
void require(bool holds, const Parts&... message) {
  if (!holds) fail("QuantizationError", message...);
}

Float float_of(ScalarType dtype) {
  if (dtype == ScalarType::Float) return Float::k32;
  if (dtype == ScalarType::Half) return Float::k16;
  require(dtype == ScalarType::BFloat16,
          "Weights decode to float32, float16 or bfloat16, got scalar type ",
          static_cast<int>(dtype), "; convert the result.");
  return Float::kB16;
}

const float* floats(const Tensor& tensor, const char* name, int64_t count) {
  if (tensor.scalar_type() != ScalarType::Float || !tensor.is_contiguous() ||
      tensor.numel() != count) {
    fail("QuantizationError", name, " must be ", count, " contiguous float32, got ", tensor.numel(),
         " elements of ", tensor.element_size(),
         " bytes; the tensors of one weight belong together.");
  }
  return static_cast<const float*>(tensor.const_data_ptr());
}

const uint8_t* codes(const Tensor& packed, int64_t numel) {
  const int64_t nbytes = packed.numel() * static_cast<int64_t>(packed.element_size());
  require(packed.is_contiguous() && nbytes == (numel + 1) / 2, "Codes of ", numel,
          " elements take ", (numel + 1) / 2, " contiguous bytes, got ", nbytes,
          "; the shape is that of another weight, or the file is damaged.");
  return static_cast<const uint8_t*>(packed.const_data_ptr());
}

void check_blocksize(int64_t blocksize) {
  require(blocksize >= 32 && blocksize <= 4096 && std::has_single_bit<uint64_t>(blocksize),
          "A blocksize is a power of two from 32 to 4096, got ", blocksize, ".");
}

const float* code_of(const std::optional<Tensor>& code) {
  return code.has_value() ? floats(*code, "code", 16) : kNormalFloat.data();
}

int64_t num_blocks(int64_t numel, int64_t blocksize) { return (numel + blocksize - 1) / blocksize; }

// --- packed weights from tensors ----------------------------------------------------------------

struct Nested {
  const Tensor& absmax;
  const Tensor& code;
  const Tensor& offset;
  int64_t blocksize;
};

Absmax nested_absmax(const Tensor& absmax, const Nested& nested, int64_t count) {
  check_blocksize(nested.blocksize);
  require(
      absmax.scalar_type() == ScalarType::Byte && absmax.is_contiguous() && absmax.numel() == count,
      "Nested absmax must be ", count, " contiguous uint8, got ", absmax.numel(), " elements of ",
      absmax.element_size(), " bytes; the tensors of one weight belong together.");
  return {nullptr,
          static_cast<const uint8_t*>(absmax.const_data_ptr()),
          floats(nested.code, "nested_code", 256),
          floats(nested.absmax, "nested_absmax", num_blocks(count, nested.blocksize)),
          *floats(nested.offset, "nested_offset", 1),
          nested.blocksize};
}

Nibbles nibbles_of(const Tensor& packed, const Tensor& absmax, int64_t blocksize, int64_t numel,
                   const std::optional<Tensor>& code, const std::optional<Nested>& nested) {
  check_blocksize(blocksize);
  const int64_t count = num_blocks(numel, blocksize);
  Absmax scales;
  if (nested.has_value()) {
    scales = nested_absmax(absmax, *nested, count);
  } else {
    scales.plain = floats(absmax, "absmax", count);
  }
  return {codes(packed, numel), scales, code_of(code), blocksize};
}

Bytes bytes_of(const Tensor& packed, const Tensor& scale, double divisor) {
  require(packed.scalar_type() == ScalarType::Char && packed.is_contiguous() && packed.dim() == 2,
          "Packed bytes must be contiguous int8 [out, in], got ", packed.dim(),
          " dimensions of elements of ", packed.element_size(), " bytes.");
  const int64_t rows = packed.size(0);
  const int64_t groups = rows == 0 ? 1 : scale.numel() / rows;
  require(groups > 0 && packed.size(1) % groups == 0 && scale.numel() == groups * rows,
          "A scale belongs to a row, or to one of equal parts of it; got ", scale.numel(),
          " scales for [", rows, ", ", packed.size(1), "].");
  return {static_cast<const int8_t*>(packed.const_data_ptr()),
          floats(scale, "scale", scale.numel()), packed.size(1) / groups,
          1.0f / static_cast<float>(divisor)};
}

// --- decoding -----------------------------------------------------------------------------------

int64_t product(const Ints& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

Ints contiguous_strides(const Ints& shape) {
  Ints strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  return strides;
}

Tensor empty(const Ints& shape, ScalarType dtype) {
  const Ints strides = contiguous_strides(shape);
  const Float type = float_of(dtype);
  const int64_t nbytes = product(shape) * size_of(type);
  if (nbytes < kLargeBytes) {
    const int32_t number = type == Float::k32   ? aoti_torch_dtype_float32()
                           : type == Float::k16 ? aoti_torch_dtype_float16()
                                                : aoti_torch_dtype_bfloat16();
    // Not through the dispatcher, which would look for the op by its name.
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()),
                                                    shape.data(), strides.data(), number,
                                                    aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  }
  Block block = recycled_block(nbytes);
  std::byte* memory = block.get();
  return torch::stable::from_blob(memory, shape, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                  [block](void*) mutable { block.reset(); });
}

std::byte* memory_of(const Tensor& tensor) {
  return static_cast<std::byte*>(tensor.mutable_data_ptr());
}

// All of a weight, by all threads.
template <typename Weight>
void decode_all(const Weight& weight, int64_t numel, Float to, std::byte* out) {
  const Range range("dequantize", weight.packed_bytes(numel));
  const int64_t unit = std::max(weight.unit(), kGrain);
  const bool past_cache = numel * size_of(to) >= kPastCacheBytes;
  torch::stable::parallel_for(0, num_blocks(numel, unit), 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * unit;
    weight.decode(first, std::min(end * unit, numel) - first, to, past_cache,
                  out + first * size_of(to));
  });
}

void check_out(const Tensor& out, const Ints& shape, ScalarType dtype) {
  if (!out.is_contiguous() || out.scalar_type() != dtype || out.numel() != product(shape)) {
    fail("QuantizationError", "out must be ", product(shape),
         " contiguous elements of the dtype asked for, got ", out.numel(), " of ",
         out.element_size(), " bytes.");
  }
}

template <typename Weight>
void decode_into(const Weight& weight, const Ints& shape, ScalarType dtype, const Tensor& out) {
  check_out(out, shape, dtype);
  decode_all(weight, product(shape), float_of(dtype), memory_of(out));
}

template <typename Weight>
Tensor decoded(const Weight& weight, const Ints& shape, ScalarType dtype) {
  Tensor out = empty(shape, dtype);
  decode_all(weight, product(shape), float_of(dtype), memory_of(out));
  return out;
}

Tensor dequantize_nf4(const Tensor& q, const Tensor& absmax, int64_t blocksize, Ints shape,
                      ScalarType dtype, std::optional<Tensor> code) {
  return decoded(nibbles_of(q, absmax, blocksize, product(shape), code, {}), shape, dtype);
}

void dequantize_nf4_out(const Tensor& q, const Tensor& absmax, int64_t blocksize, Ints shape,
                        ScalarType dtype, std::optional<Tensor> code, const Tensor& out) {
  decode_into(nibbles_of(q, absmax, blocksize, product(shape), code, {}), shape, dtype, out);
}

Tensor dequantize_nf4_nested(const Tensor& q, const Tensor& absmax, const Tensor& nested_absmax,
                             const Tensor& nested_code, const Tensor& nested_offset,
                             int64_t blocksize, int64_t nested_blocksize, Ints shape,
                             ScalarType dtype, std::optional<Tensor> code) {
  const Nested nested{nested_absmax, nested_code, nested_offset, nested_blocksize};
  return decoded(nibbles_of(q, absmax, blocksize, product(shape), code, nested), shape, dtype);
}

void dequantize_nf4_nested_out(const Tensor& q, const Tensor& absmax, const Tensor& nested_absmax,
                               const Tensor& nested_code, const Tensor& nested_offset,
                               int64_t blocksize, int64_t nested_blocksize, Ints shape,
                               ScalarType dtype, std::optional<Tensor> code, const Tensor& out) {
  const Nested nested{nested_absmax, nested_code, nested_offset, nested_blocksize};
  decode_into(nibbles_of(q, absmax, blocksize, product(shape), code, nested), shape, dtype, out);
}

Tensor dequantize_int8(const Tensor& q, const Tensor& scale, ScalarType dtype, double divisor) {
  const Bytes weight = bytes_of(q, scale, divisor);
  return decoded(weight, {q.size(0), q.size(1)}, dtype);
}

void dequantize_int8_out(const Tensor& q, const Tensor& scale, ScalarType dtype, double divisor,
                         const Tensor& out) {
  const Bytes weight = bytes_of(q, scale, divisor);
  decode_into(weight, {q.size(0), q.size(1)}, dtype, out);
}

Tensor dequantize_ggml(const Tensor& blocks, std::string kind, Ints shape, ScalarType dtype) {
  const Ggml weight(static_cast<const uint8_t*>(blocks.const_data_ptr()), kind);
  const int64_t numel = product(shape);
  const int64_t nbytes = blocks.numel() * static_cast<int64_t>(blocks.element_size());
  require(blocks.is_contiguous() && numel % kGgmlBlock == 0 && nbytes == weight.packed_bytes(numel),
          numel, " elements of ", kind, " take ", weight.packed_bytes(numel),
          " contiguous bytes, got ", nbytes, "; the shape is that of another weight.");
  return decoded(weight, shape, dtype);
}

// --- several weights in one arena ---------------------------------------------------------------

class Unit {
 public:
  Unit(const Tensor& arena, const int64_t* offsets) : arena_(arena), offsets_(offsets) {}

  template <typename T>
  const T* part(int index, int64_t count) const {
    const int64_t offset = offsets_[index];
    const auto nbytes = count * static_cast<int64_t>(sizeof(T));
    require(offset >= 0 && offset <= arena_.numel() - nbytes, "Part ", index, " of a unit, ",
            nbytes, " bytes at ", offset, ", must lie in the arena of ", arena_.numel(), ".");
    const auto* first = static_cast<const uint8_t*>(arena_.const_data_ptr()) + offset;
    require(is_aligned(first, alignof(T)), "Part ", index,
            " of a unit must be aligned to its numbers, but lies at ", offset, ".");
    return reinterpret_cast<const T*>(first);
  }

 private:
  const Tensor& arena_;
  const int64_t* offsets_;
};

Tensor dequantize_nf4_grouped(const Tensor& arena, const Tensor& offsets,
                              std::optional<Tensor> nested_code,
                              std::optional<Tensor> nested_offsets, int64_t blocksize,
                              int64_t nested_blocksize, int64_t num_units, Ints unit_shape,
                              ScalarType dtype, std::optional<Tensor> code) {
  check_blocksize(blocksize);
  check_blocksize(nested_blocksize);
  const bool is_nested = nested_code.has_value();
  const int64_t num_parts = is_nested ? 3 : 2;
  require(arena.scalar_type() == ScalarType::Byte && arena.is_contiguous(),
          "An arena is contiguous uint8.");
  require(offsets.scalar_type() == ScalarType::Long && offsets.is_contiguous() &&
              offsets.numel() == num_units * num_parts,
          "Offsets must be contiguous int64 [", num_units, ", ", num_parts, "], got ",
          offsets.numel(), " elements of ", offsets.element_size(), " bytes.");
  require(is_nested == nested_offsets.has_value(),
          "nested_code and nested_offsets must be given together.");
  const float* table = is_nested ? floats(*nested_code, "nested_code", 256) : nullptr;
  const float* means = is_nested ? floats(*nested_offsets, "nested_offsets", num_units) : nullptr;
  const auto* first = static_cast<const int64_t*>(offsets.const_data_ptr());
  const int64_t numel = product(unit_shape);
  const int64_t blocks = num_blocks(numel, blocksize);

  Ints shape = unit_shape;
  shape.insert(shape.begin(), num_units);
  Tensor out = empty(shape, dtype);
  const Float to = float_of(dtype);
  for (int64_t i = 0; i < num_units; ++i) {
    const Unit unit(arena, first + i * num_parts);
    Absmax absmax;
    if (is_nested) {
      absmax = {nullptr,  unit.part<uint8_t>(1, blocks),
                table,    unit.part<float>(2, num_blocks(blocks, nested_blocksize)),
                means[i], nested_blocksize};
    } else {
      absmax.plain = unit.part<float>(1, blocks);
    }
    const Nibbles weight(unit.part<uint8_t>(0, (numel + 1) / 2), absmax, code_of(code), blocksize);
    decode_all(weight, numel, to, memory_of(out) + i * numel * size_of(to));
  }
  return out;
}

// --- linear -------------------------------------------------------------------------------------

// A tile of decoded rows that stays in a core's cache.
constexpr int64_t kTileBytes = 1 << 20;
constexpr int64_t kTileRows = 64;

Tensor matmul_with(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Where products are not made in registers, a matrix library wins from fewer rows of x on, though
// the whole weight is decoded for it (benchmarks/bench_quant.py).
constexpr int64_t kFusedInCache = 4;

// x [..., width] times a weight [num_rows, width].
struct Product {
  const Tensor& x;
  int64_t num_inputs;
  int64_t num_rows;
  int64_t width;
  const std::optional<Tensor>& bias;

  ScalarType dtype() const { return x.scalar_type(); }
  Ints shape() const {
    Ints sizes;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
    sizes.push_back(num_rows);
    return sizes;
  }
};

// Many rows of x: decode a tile of the weight, multiply, go on.
template <typename Weight>
Tensor tiled_linear(const Product& product, const Weight& weight) {
  const auto [x, num_inputs, num_rows, width, bias] = product;
  const Float type = float_of(product.dtype());
  const Tensor flat = torch::stable::reshape(x, {num_inputs, width});
  const int64_t row_bytes = width * size_of(type);
  // Tiles begin where a block does.
  const int64_t unit =
      std::max(kTileRows, weight.unit() / std::gcd(weight.unit(), std::max<int64_t>(width, 1)));
  const int64_t wanted = align_up(kTileBytes / std::max<int64_t>(row_bytes, 1), unit);
  const int64_t step = std::min(std::max(wanted, unit), num_rows);
  const Block scratch = recycled_block(std::max<int64_t>(step * row_bytes, 1));
  const Tensor out = empty({num_inputs, num_rows}, product.dtype());
  for (int64_t row = 0; row < num_rows; row += step) {
    const int64_t rows = std::min(step, num_rows - row);
    const int64_t first = row * width;
    torch::stable::parallel_for(0, num_blocks(rows * width, kGrain), 1, [&](int64_t b, int64_t e) {
      const int64_t begin = b * kGrain;
      weight.decode(first + begin, std::min(e * kGrain, rows * width) - begin, type, false,
                    scratch.get() + begin * size_of(type));
    });
    const Ints shape = {rows, width};
    const Ints strides = {width, 1};
    const Tensor tile = torch::stable::from_blob(
        scratch.get(), shape, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU),
        product.dtype());
    std::optional<Tensor> part = bias;
    if (bias.has_value()) {
      Tensor all = *bias;
      part = torch::stable::narrow(all, 0, row, rows);
    }
    Tensor all_columns = out;
    Tensor place = torch::stable::narrow(all_columns, 1, row, rows);
    torch::stable::copy_(place, matmul_with(flat, tile, part));
  }
  return torch::stable::view(out, product.shape());
}

// Few rows of x: the weight is decoded where it is multiplied.
template <typename Weight>
Tensor fused_linear(const Product& product, const Weight& weight) {
  const auto [x, num_inputs, num_rows, width, bias] = product;
  const Float type = float_of(product.dtype());
  const Tensor dense = x.is_contiguous() ? x : torch::stable::contiguous(x);
  const Tensor out = empty(product.shape(), product.dtype());
  const LinearInput input{static_cast<const std::byte*>(dense.const_data_ptr()), num_inputs, width,
                          type};
  const std::byte* bias_memory =
      bias.has_value() ? static_cast<const std::byte*>(bias->const_data_ptr()) : nullptr;
  const bool has_dots = weight.has_dots(width, type);
  std::vector<uint16_t> shuffled(static_cast<size_t>(has_dots ? num_inputs * width : 0));
  for (int64_t m = 0; has_dots && m < num_inputs; ++m) {
    shuffle_for_dots(reinterpret_cast<const uint16_t*>(input.memory) + m * width, width,
                     shuffled.data() + m * width);
  }
  const auto* for_dots = has_dots ? reinterpret_cast<const std::byte*>(shuffled.data()) : nullptr;
  const int64_t grain = std::max<int64_t>(1, kGrain / width);
  torch::stable::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    multiply_rows(input, for_dots, weight, begin, end, bias_memory, num_rows, memory_of(out));
  });
  return out;
}

template <typename Weight>
Tensor linear(const Product& product, const Weight& weight) {
  const int64_t width = product.width;
  if (product.x.size(product.x.dim() - 1) != width) {
    fail("QuantizationError", "x must be [..., ", width, "], as wide as the weight's rows; got ",
         product.x.size(product.x.dim() - 1), ".");
  }
  const auto& bias = product.bias;
  if (bias.has_value() && (bias->dim() != 1 || bias->numel() != product.num_rows ||
                           !bias->is_contiguous() || bias->scalar_type() != product.dtype())) {
    fail("QuantizationError", "bias must be ", product.num_rows,
         " contiguous elements of the dtype of x, got ", bias->numel(), " in ", bias->dim(),
         " dimensions, of ", bias->element_size(), " bytes.");
  }
  // What begins a row must begin a block, or a row could not be decoded by itself.
  const bool can_fuse = width > 0 && width % weight.unit() == 0;
  const int64_t most =
      weight.has_dots(width, float_of(product.dtype())) ? kFusedInputs : kFusedInCache;
  if (can_fuse && product.num_inputs <= most) return fused_linear(product, weight);
  return tiled_linear(product, weight);
}

// How many rows [..., width] has.
int64_t num_inputs_of(const Tensor& x) {
  require(x.dim() > 0, "x must be [..., in_features], got a number.");
  int64_t count = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) count *= x.size(i);
  return count;
}

Tensor nf4_linear(const Tensor& x, const Tensor& q, const Tensor& absmax,
                  std::optional<Tensor> bias, int64_t blocksize, int64_t out_features,
                  std::optional<Tensor> code, std::optional<Tensor> nested_absmax,
                  std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset,
                  int64_t nested_blocksize) {
  const bool is_nested = nested_absmax.has_value();
  require(is_nested == nested_code.has_value() && is_nested == nested_offset.has_value(),
          "nested_absmax, nested_code and nested_offset must be given together.");
  const int64_t num_inputs = num_inputs_of(x);
  const int64_t width = x.size(x.dim() - 1);
  std::optional<Nested> nested;
  if (is_nested) nested.emplace(*nested_absmax, *nested_code, *nested_offset, nested_blocksize);
  return linear({x, num_inputs, out_features, width, bias},
                nibbles_of(q, absmax, blocksize, out_features * width, code, nested));
}

Tensor int8_linear(const Tensor& x, const Tensor& q, const Tensor& scale,
                   std::optional<Tensor> bias, double divisor) {
  const Bytes weight = bytes_of(q, scale, divisor);
  return linear({x, num_inputs_of(x), q.size(0), q.size(1), bias}, weight);
}

// --- encoding -----------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> quantize_nf4(const Tensor& weight, int64_t blocksize,
                                        int64_t num_scales) {
  check_blocksize(blocksize);
  require(num_scales >= 1 && num_scales <= 1024, "num_scales lies in 1..1024, got ", num_scales,
          ".");
  const ScalarType dtype = weight.scalar_type();
  require(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
          "Weights to quantise are float32, float16 or bfloat16, got scalar type ",
          static_cast<int>(dtype), "; convert them first.");
  const Tensor numbers = torch::stable::contiguous(weight);
  const int64_t numel = numbers.numel();
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  Tensor q = torch::stable::empty(Ints{(numel + 1) / 2}, ScalarType::Byte, std::nullopt, cpu);
  Tensor absmax = torch::stable::empty(Ints{num_blocks(numel, blocksize)}, ScalarType::Float,
                                       std::nullopt, cpu);
  const Float type = float_of(dtype);
  const auto* from = static_cast<const std::byte*>(numbers.const_data_ptr());
  auto* to = static_cast<uint8_t*>(q.mutable_data_ptr());
  auto* scales = static_cast<float*>(absmax.mutable_data_ptr());
  std::atomic<bool> is_finite = true;
  const int64_t unit = std::max(blocksize, kGrain);
  torch::stable::parallel_for(0, num_blocks(numel, unit), 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * unit;
    if (!encode_nf4(from + first * size_of(type), type, blocksize, num_scales,
                    std::min(end * unit, numel) - first, to + first / 2,
                    scales + first / blocksize)) {
      is_finite = false;
    }
  });
  require(is_finite,
          "Weights to quantise must be finite; these hold NaN or infinity. A block's "
          "scale would be lost: repair the checkpoint, or leave this weight as it is.");
  return {q, absmax};
}

}  // namespace
}  // namespace nexus

STABLE_TORCH_LIBRARY_IMPL(nexus, CPU, m) {
  m.impl("dequantize_nf4", TORCH_BOX(&nexus::dequantize_nf4));
  m.impl("dequantize_nf4.out", TORCH_BOX(&nexus::dequantize_nf4_out));
  m.impl("dequantize_nf4_nested", TORCH_BOX(&nexus::dequantize_nf4_nested));
  m.impl("dequantize_nf4_nested.out", TORCH_BOX(&nexus::dequantize_nf4_nested_out));
  m.impl("dequantize_nf4_grouped", TORCH_BOX(&nexus::dequantize_nf4_grouped));
  m.impl("dequantize_int8", TORCH_BOX(&nexus::dequantize_int8));
  m.impl("dequantize_int8.out", TORCH_BOX(&nexus::dequantize_int8_out));
  m.impl("dequantize_ggml", TORCH_BOX(&nexus::dequantize_ggml));
  m.impl("quantize_nf4", TORCH_BOX(&nexus::quantize_nf4));
  m.impl("nf4_linear", TORCH_BOX(&nexus::nf4_linear));
  m.impl("int8_linear", TORCH_BOX(&nexus::int8_linear));
}
