// Every schema on one page, and the thin glue between torch's stable ABI and the engine. Nothing
// else includes torch. Fakes and wrappers: nexus_ext/ops.py.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#pragma GCC diagnostic pop

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <iterator>
#include <string>
#include <vector>

#include "common/error.h"
#include "common/range.h"
#include "common/xxh3.h"
#include "io/blocks.h"
#include "io/measure.h"
#include "io/page_cache.h"
#include "python_module.h"
#include "quant/codec.h"
#include "stream/measure.h"
#include "stream/registry.h"

using torch::stable::Tensor;

namespace nexus {
namespace {

using Ints = std::vector<int64_t>;

std::byte* bytes_of(const Tensor& tensor) {
  return static_cast<std::byte*>(tensor.mutable_data_ptr());
}

// What no int can hold is no group, file or arena either, and is refused as one.
int number(int64_t value) {
  return value == static_cast<int>(value) ? static_cast<int>(value) : -1;
}

ReadMode read_mode(const std::string& io, bool allow_uring, bool trailing_drop, int64_t depth,
                   int64_t chunk_bytes) {
  return {io, allow_uring, trailing_drop, number(depth), chunk_bytes};
}

FaultPlan fault_plan(const Ints& faults) {
  return {faults.at(0), faults.at(1), faults.at(2), faults.at(3),
          faults.at(4), faults.at(5), faults.at(6), faults.at(7)};
}

// --- acquire_ ---------------------------------------------------------------------------------

GroupId group_id_of(const Tensor& group_id) {
  if (group_id.scalar_type() != torch::headeronly::ScalarType::Long || group_id.numel() != 1) {
    fail("EngineError", "A group id is a 0-dim int64 tensor, got ", group_id.numel(),
         " elements of ", group_id.element_size(), " bytes.");
  }
  return unpack_group_id(*static_cast<const int64_t*>(group_id.const_data_ptr()));
}

// Runs what a graph may have called.
template <typename Action>
void noting_failure(const Action& action) {
  try {
    action();
  } catch (const std::exception& error) {
    note_failure(error.what());
    throw;
  }
}

void acquire_group(const Tensor& arena, const Tensor& group_id, bool hold) {
  noting_failure([&] {
    const GroupId id = group_id_of(group_id);
    find_engine(id.engine)->acquire(id.group, bytes_of(arena), arena.numel(), hold);
  });
}

// `dep` orders the call after the computation that produced it; its values are not looked at.
void acquire_(const Tensor& arena, const Tensor&, const Tensor& group_id) {
  acquire_group(arena, group_id, false);
}

void acquire_held_(const Tensor& arena, const Tensor&, const Tensor&, const Tensor& group_id) {
  acquire_group(arena, group_id, true);
}

void release_(const Tensor&, const Tensor&, std::vector<Tensor>, const Tensor& group_id) {
  noting_failure([&] {
    const GroupId id = group_id_of(group_id);
    find_engine(id.engine)->release(id.group);
  });
}

int64_t engine_group_id(int64_t engine, int64_t group) {
  if (group < 0 || group >> kGroupBits != 0) {
    fail("EngineError", "A group number lies in [0, 2^", kGroupBits, "), got ", group, ".");
  }
  return engine << kGroupBits | group;
}

// --- the engine ---------------------------------------------------------------------------------

// "cpu", or "cuda:" and a number.
std::unique_ptr<Device> make_device(const std::string& name) {
  if (name == "cpu") return make_cpu_device();
  constexpr std::string_view kCuda = "cuda:";
  int index = -1;
  const char* end = name.data() + name.size();
  if (name.starts_with(kCuda) &&
      std::from_chars(name.data() + kCuda.size(), end, index).ptr == end && index >= 0) {
    return make_cuda_device(index);
  }
  fail("ConfigError", "A device is \"cpu\" or \"cuda:0\", \"cuda:1\", ...; got \"", name, "\".");
}

int64_t engine_open(std::vector<std::string> paths, Ints stamps, std::string device, std::string io,
                    bool allow_uring, bool trailing_drop, int64_t depth, int64_t chunk_bytes,
                    int64_t num_slots, bool poison, Ints faults, Ints descriptors, bool is_whole) {
  std::vector<std::unique_ptr<File>> files;
  for (size_t i = 0; i < paths.size(); ++i) {
    const int64_t* stamp = &stamps.at(4 * i);
    const Stamp expected = {stamp[0], stamp[1], stamp[2], stamp[3]};
    const int64_t descriptor = descriptors.empty() ? -1 : descriptors.at(i);
    files.push_back(descriptor < 0
                        ? std::make_unique<File>(paths[i], expected)
                        : std::make_unique<File>(paths[i], expected, number(descriptor), is_whole));
  }
  EngineOptions options;
  options.mode = read_mode(io, allow_uring, trailing_drop, depth, chunk_bytes);
  options.poison = poison;
  options.num_slots = number(num_slots);
  options.has_faults = !faults.empty();
  if (options.has_faults) options.faults = fault_plan(faults);
  return register_engine(
      std::make_shared<Engine>(std::move(files), make_device(device), std::move(options)));
}

void engine_attach(int64_t engine, std::vector<Tensor> arenas, Ints groups, Ints extents,
                   Ints order, int64_t lookahead) {
  std::vector<ArenaMemory> memory;
  for (const Tensor& arena : arenas) {
    memory.push_back({std::make_shared<Tensor>(arena), bytes_of(arena), arena.numel()});
  }
  std::vector<GroupSpec> specs;
  for (size_t i = 0; i < groups.size(); i += 5) {
    specs.push_back({number(groups[i]),
                     groups.at(i + 1),
                     groups.at(i + 2) != 0,
                     groups.at(i + 3) != 0,
                     {},
                     groups.at(i + 4) != 0});
  }
  for (size_t i = 0; i < extents.size(); i += 5) {
    specs.at(static_cast<size_t>(extents[i]))
        .extents.push_back(
            {number(extents.at(i + 1)), extents.at(i + 2), extents.at(i + 3), extents.at(i + 4)});
  }
  find_engine(engine)->attach(std::move(memory), specs, {order.begin(), order.end()},
                              static_cast<int>(lookahead));
}

void engine_set_digests(int64_t engine, Ints digests, std::string verify) {
  if (verify != "off" && verify != "first" && verify != "always") {
    fail("ConfigError", "verify must be \"off\", \"first\" or \"always\", got \"", verify, "\".");
  }
  const Verify mode = verify == "always"  ? Verify::kAlways
                      : verify == "first" ? Verify::kFirst
                                          : Verify::kOff;
  find_engine(engine)->set_digests({digests.begin(), digests.end()}, mode);
}

int64_t engine_digest(int64_t engine, int64_t group) {
  return static_cast<int64_t>(find_engine(engine)->digest_of(number(group)));
}

void engine_wait(int64_t engine, int64_t group) {
  find_engine(engine)->wait_resident(number(group));
}

std::vector<int> numbers(const Ints& values) {
  std::vector<int> all;
  for (const int64_t value : values) all.push_back(number(value));
  return all;
}

void engine_place(int64_t engine, Ints groups, Ints arenas, bool is_ahead) {
  find_engine(engine)->place(numbers(groups), numbers(arenas), is_ahead);
}

Ints engine_collect(int64_t engine, Ints groups, int64_t at_least) {
  const std::vector<int> landed = find_engine(engine)->collect(numbers(groups), at_least);
  return {landed.begin(), landed.end()};
}

void engine_evict(int64_t engine, Ints groups) { find_engine(engine)->evict(numbers(groups)); }

void engine_end_pass(int64_t engine, int64_t caller) { find_engine(engine)->end_pass(caller); }

void engine_prefault(int64_t engine, bool background) { find_engine(engine)->prefault(background); }

void engine_read_rows(const Tensor& out, const Tensor& rows, int64_t engine, int64_t file,
                      int64_t offset, int64_t row_bytes, int64_t num_rows) {
  using torch::headeronly::ScalarType;
  if (rows.scalar_type() != ScalarType::Long || !rows.is_contiguous() || !out.is_contiguous() ||
      out.scalar_type() != ScalarType::Byte || out.numel() != rows.numel() * row_bytes) {
    fail("EngineError",
         "Rows are contiguous int64 numbers, and `out` has a byte for each of "
         "theirs; got ",
         rows.numel(), " rows of ", row_bytes, " bytes for ", out.numel(), ".");
  }
  const auto* first = static_cast<const int64_t*>(rows.const_data_ptr());
  find_engine(engine)->read_rows(number(file), {offset, row_bytes, num_rows},
                                 {first, static_cast<size_t>(rows.numel())}, bytes_of(out));
}

Tensor engine_map(int64_t engine, int64_t file, int64_t offset, int64_t nbytes) {
  std::shared_ptr<std::byte> pages = find_engine(engine)->map(number(file), offset, nbytes);
  const int64_t sizes[] = {nbytes};
  const int64_t strides[] = {1};
  return torch::stable::from_blob(pages.get(), {sizes, 1}, {strides, 1},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  torch::headeronly::ScalarType::Byte,
                                  [pages](void*) mutable { pages.reset(); });
}

// Null once the engine was closed: to those who serve it that is no error.
std::shared_ptr<ExternalReader> external_of(int64_t engine) {
  const std::shared_ptr<Engine> found = find_engine_in_service(engine);
  return found == nullptr ? nullptr : found->external();
}

Ints external_take(int64_t engine) {
  const auto reader = external_of(engine);
  const auto order = reader == nullptr ? std::nullopt : reader->take();
  if (!order) return {};
  return {order->ticket, order->file, order->offset, order->nbytes,
          reinterpret_cast<int64_t>(order->buffer)};
}

void external_answer(int64_t engine, int64_t ticket, int64_t result, std::string text) {
  if (const auto reader = external_of(engine)) reader->answer(ticket, result, text);
}

void external_abandon(int64_t engine, std::string reason) {
  if (const auto reader = external_of(engine)) reader->abandon(reason);
}

void engine_announce(int64_t engine, Ints spans) {
  std::vector<Span> all;
  for (size_t i = 0; i < spans.size(); i += 3) {
    all.push_back({number(spans[i]), spans.at(i + 1), spans.at(i + 2)});
  }
  find_engine(engine)->announce(all);
}

void engine_settle(int64_t engine, int64_t file, int64_t mtime_ns) {
  find_engine(engine)->settle(number(file), mtime_ns);
}

void engine_end_arrival(int64_t engine, std::string why) { find_engine(engine)->end_arrival(why); }

void engine_refuse(int64_t engine, std::string why) { find_engine(engine)->refuse(why); }

std::string engine_stats(int64_t engine) { return find_engine(engine)->stats(); }

void engine_close(int64_t engine) {
  const std::shared_ptr<Engine> found = unregister_engine(engine);
  if (found == nullptr) return;
  if (found->is_in_this_process()) return found->close();
  // In a forked child its threads are gone, and whatever they held stays held: it is left alone.
  (void)new std::shared_ptr<Engine>(found);
}

// --- blocks with digests ------------------------------------------------------------------------

bool is_contiguous_cpu(const Tensor& tensor, torch::headeronly::ScalarType type) {
  return tensor.scalar_type() == type && tensor.is_contiguous() && tensor.is_cpu();
}

int64_t num_blocks(int64_t nbytes, int64_t block_bytes) {
  return nbytes / block_bytes + (nbytes % block_bytes != 0 ? 1 : 0);
}

void check_block_bytes(int64_t block_bytes) {
  if (block_bytes <= 0) fail("EngineError", "A block has bytes, got ", block_bytes, ".");
}

Tensor read_blocks_op(const Tensor& out, std::string path, Ints stamp, int64_t offset,
                      const Tensor& digests, int64_t block_bytes, std::string io, bool allow_uring,
                      int64_t depth, Ints faults) {
  using torch::headeronly::ScalarType;
  check_block_bytes(block_bytes);
  if (!is_contiguous_cpu(out, ScalarType::Byte) || !is_contiguous_cpu(digests, ScalarType::Long) ||
      digests.numel() != num_blocks(out.numel(), block_bytes) || offset < 0) {
    fail("EngineError",
         "Blocks are read into contiguous uint8 on the CPU, each with an int64 digest, from an "
         "offset of 0 or more; got ",
         out.numel(), " bytes and ", digests.numel(), " digests of blocks of ", block_bytes,
         " from ", offset, ".");
  }
  if (io != "direct" && io != "buffered") {
    fail("ConfigError", "Blocks are read with io \"direct\" or \"buffered\", got \"", io, "\".");
  }
  const auto* first = static_cast<const int64_t*>(digests.const_data_ptr());
  const BlockTable table = {
      offset, out.numel(), block_bytes, {first, static_cast<size_t>(digests.numel())}};
  const FaultPlan plan = faults.empty() ? FaultPlan{} : fault_plan(faults);
  const BlockVerdict verdict = read_blocks(
      path, {stamp.at(0), stamp.at(1), stamp.at(2), stamp.at(3)}, table, bytes_of(out),
      read_mode(io, allow_uring, true, depth, block_bytes), faults.empty() ? nullptr : &plan);
  const int64_t fields[] = {
      verdict.bad_block,    verdict.error,     verdict.is_direct ? 1 : 0, verdict.is_ring ? 1 : 0,
      verdict.bytes_staged, verdict.num_plain, verdict.num_second,        verdict.num_faults};
  const int64_t sizes[] = {std::size(fields)};
  const Tensor answer = torch::stable::new_empty(digests, {sizes, 1});
  std::memcpy(answer.mutable_data_ptr(), fields, sizeof(fields));
  return answer;
}

// Parts are hashed as if they lay behind one another.
Tensor block_digests(std::vector<Tensor> parts, int64_t block_bytes) {
  using torch::headeronly::ScalarType;
  check_block_bytes(block_bytes);
  std::vector<uint64_t> digests;
  Xxh3 hash;
  int64_t filled = 0;
  for (const Tensor& part : parts) {
    if (!is_contiguous_cpu(part, ScalarType::Byte)) {
      fail("EngineError", "Blocks are made of contiguous uint8 on the CPU.");
    }
    const std::byte* bytes = bytes_of(part);
    for (int64_t at = 0; at < part.numel();) {
      const int64_t taken = std::min(block_bytes - filled, part.numel() - at);
      hash.update(bytes + at, static_cast<size_t>(taken));
      at += taken;
      filled += taken;
      if (filled < block_bytes) continue;
      digests.push_back(hash.digest());
      hash = Xxh3();
      filled = 0;
    }
  }
  if (filled > 0) digests.push_back(hash.digest());
  const int64_t sizes[] = {static_cast<int64_t>(digests.size())};
  const Tensor answer = torch::stable::new_empty(parts.at(0), {sizes, 1}, ScalarType::Long);
  std::copy(digests.begin(), digests.end(), static_cast<uint64_t*>(answer.mutable_data_ptr()));
  return answer;
}

// --- the machine --------------------------------------------------------------------------------

std::string measure(std::string path, std::string io, bool allow_uring, int64_t depth,
                    int64_t chunk_bytes, int64_t max_bytes) {
  return measure_read(path, read_mode(io, allow_uring, true, depth, chunk_bytes), max_bytes);
}

std::string copy_rate(const Tensor& arena, std::string device, int64_t chunk_bytes,
                      int64_t max_bytes) {
  return measure_copy(*make_device(device), bytes_of(arena), arena.numel(), chunk_bytes, max_bytes);
}

int64_t file_cached_bytes(std::string path) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
  struct stat info;
  if (descriptor < 0 || fstat(descriptor, &info) != 0) {
    fail("ReadError", "A file must be readable; cannot open ", path, ": ", std::strerror(errno));
  }
  const int64_t cached = info.st_size == 0 ? 0 : cached_bytes(descriptor, info.st_size);
  close(descriptor);
  return cached;
}

int64_t xxh3(const Tensor& data) {
  return static_cast<int64_t>(
      xxh3_64(data.const_data_ptr(),
              static_cast<size_t>(data.numel()) * static_cast<size_t>(data.element_size())));
}

}  // namespace
}  // namespace nexus

// Compilers keep the code of a graph on disk, under the names and arguments of its ops and not
// their schemas: an op that comes to mutate something else needs another name or argument.
STABLE_TORCH_LIBRARY(nexus, m) {
  nexus::interrupted = &nexus::check_python_signals;

  // Makes `arena` hold the group of `group_id` (0-dim int64 CPU tensor of engine_group_id), and
  // frees the arena of the group acquired before. Blocks the host until the bytes are there.
  // Mutates the arena, and says so.
  m.def("acquire_(Tensor(a!) arena, Tensor dep, Tensor group_id) -> ()");

  // The same, but the arena stays as it is until release_, however many groups are acquired
  // meanwhile: for compiled code, whose readers need not run before the next group's acquire_.
  // `turn` is one byte per model, and nobody's data: both ops say that they mutate it, so that no
  // compiler changes their order, though arenas that share memory look like different tensors.
  m.def("acquire_.held(Tensor(a!) arena, Tensor(b!) turn, Tensor dep, Tensor group_id) -> ()");
  // Every reader of the held group has run: the arena may be refilled, and is said to be mutated.
  // `deps` are what the readers made: computed before, they need no copy of the arena.
  m.def("release_(Tensor(a!) arena, Tensor(b!) turn, Tensor[] deps, Tensor group_id) -> ()");

  // Pure: functions of their inputs and of the checkpoint. Kernels and gradients:
  // nexus_ext/rows.py. x [..., in] @ W[out, in]^T + bias; W is read in tiles of rows.
  m.def("streamed_linear(Tensor x, Tensor? bias, Tensor weight_id, SymInt out_features) -> Tensor");
  // grad [..., out] @ W[out, in]: the gradient of x.
  m.def("streamed_linear_grad(Tensor grad, Tensor weight_id, SymInt in_features) -> Tensor");
  // The rows of a table [num, dim] that `ids` (int32 or int64, any shape) name: [*ids.shape, dim].
  m.def("streamed_embedding(Tensor ids, Tensor table_id, SymInt dim, ScalarType dtype) -> Tensor");

  // Pure: each row of hidden [n, width] through the k of many weights that top_k_index [n, k]
  // names, summed with top_k_weights [n, k]: like hidden. Kernels and gradients are registered by
  // Python.
  m.def(
      "streamed_experts(Tensor hidden, Tensor top_k_index, Tensor top_k_weights, Tensor layer_id) "
      "-> Tensor");
  // Of hidden and of top_k_weights.
  m.def(
      "streamed_experts_grad(Tensor grad, Tensor hidden, Tensor top_k_index, "
      "Tensor top_k_weights, Tensor layer_id) -> (Tensor, Tensor)");

  // Pure: packed weights and back; nexus_ext/quant/reference.py says what each computes. q: bytes,
  // two codes in each (the first in the high half), over the flattened weight; absmax: float32, one
  // for `blocksize` elements; code: what the sixteen codes mean, by default NormalFloat's; dtype:
  // float32, float16 or bfloat16. CPU kernels: csrc/quant/ops.cpp, others:
  // nexus_ext/quant/registration.py.
  m.def(
      "dequantize_nf4(Tensor q, Tensor absmax, int blocksize, SymInt[] shape, ScalarType dtype, "
      "Tensor? code=None) -> Tensor");
  m.def(
      "dequantize_nf4.out(Tensor q, Tensor absmax, int blocksize, SymInt[] shape, "
      "ScalarType dtype, Tensor? code=None, *, Tensor(a!) out) -> ()");
  // absmax: uint8, numbers of nested_code [256]; nested_absmax: float32, one for
  // `nested_blocksize` of them; nested_offset: float32, one element.
  m.def(
      "dequantize_nf4_nested(Tensor q, Tensor absmax, Tensor nested_absmax, Tensor nested_code, "
      "Tensor nested_offset, int blocksize, int nested_blocksize, SymInt[] shape, "
      "ScalarType dtype, Tensor? code=None) -> Tensor");
  m.def(
      "dequantize_nf4_nested.out(Tensor q, Tensor absmax, Tensor nested_absmax, "
      "Tensor nested_code, Tensor nested_offset, int blocksize, int nested_blocksize, "
      "SymInt[] shape, ScalarType dtype, Tensor? code=None, *, Tensor(a!) out) -> ()");
  // Weights of one shape that lie in one arena (uint8): offsets (int64) [num_units, 2] in bytes, of
  // q and absmax, or [num_units, 3], of q, absmax and nested_absmax. [num_units, *unit_shape].
  m.def(
      "dequantize_nf4_grouped(Tensor arena, Tensor offsets, Tensor? nested_code, "
      "Tensor? nested_offsets, int blocksize, int nested_blocksize, SymInt num_units, "
      "SymInt[] unit_shape, ScalarType dtype, Tensor? code=None) -> Tensor");
  // q: int8 [out, in]; scale: float32, for each row or each of equal parts of the rows.
  m.def("dequantize_int8(Tensor q, Tensor scale, ScalarType dtype, float divisor=127.) -> Tensor");
  m.def(
      "dequantize_int8.out(Tensor q, Tensor scale, ScalarType dtype, float divisor=127., *, "
      "Tensor(a!) out) -> ()");
  // blocks: bytes of GGUF's kind, "q8_0" or "q4_0", 32 elements in each.
  m.def("dequantize_ggml(Tensor blocks, str kind, SymInt[] shape, ScalarType dtype) -> Tensor");
  // num_scales: how many scales are tried for each block; 1 is the largest magnitude alone.
  m.def("quantize_nf4(Tensor weight, int blocksize, int num_scales=1) -> (Tensor, Tensor)");
  m.def(
      "quantize_nf4_nested(Tensor weight, int blocksize, int num_scales=1) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def("quantize_int8(Tensor weight) -> (Tensor, Tensor)");
  // linear(x, decoded weight, bias), without a decoded weight in memory.
  m.def(
      "nf4_linear(Tensor x, Tensor q, Tensor absmax, Tensor? bias, int blocksize, "
      "SymInt out_features, Tensor? code=None, Tensor? nested_absmax=None, "
      "Tensor? nested_code=None, Tensor? nested_offset=None, int nested_blocksize=256) -> Tensor");
  m.def(
      "int8_linear(Tensor x, Tensor q, Tensor scale, Tensor? bias, float divisor=127.) -> Tensor");
  // Which instructions decode on the CPU; a test may choose worse ones.
  m.def("use_codec(str name) -> str");

  // stamps: device, inode, size, mtime_ns per path. faults: the fields of FaultPlan, or empty.
  m.def(
      "engine_open(str[] paths, int[] stamps, str device, str io, bool allow_uring, "
      "bool trailing_drop, int depth, int chunk_bytes, int num_slots, bool poison, "
      "int[] faults, int[] descriptors, bool is_whole) -> int");
  // groups: arena, nbytes, is_brief, stays_in_ram, is_pooled per group. extents: group, file,
  // offset, nbytes, group_offset per extent.
  m.def(
      "engine_attach(int engine, Tensor[] arenas, int[] groups, int[] extents, int[] order, "
      "int lookahead) -> ()");
  m.def("engine_set_digests(int engine, int[] digests, str verify) -> ()");
  m.def("engine_digest(int engine, int group) -> int");
  m.def("engine_group_id(int engine, int group) -> int");
  m.def("engine_wait(int engine, int group) -> ()");
  // Pooled groups: arenas[i] is given groups[i] to load; does not block.
  m.def("engine_place(int engine, int[] groups, int[] arenas, bool is_ahead) -> ()");
  // Those that have landed, in the order asked; blocks until `at_least` have.
  m.def("engine_collect(int engine, int[] groups, int at_least) -> int[]");
  m.def("engine_evict(int engine, int[] groups) -> ()");
  // The calling thread's number, by which engine_end_pass knows whose pass is over.
  m.def("caller() -> int");
  m.def("engine_end_pass(int engine, int caller) -> ()");
  m.def("engine_prefault(int engine, bool background) -> ()");
  // Row rows[i] (int64) of the table goes to the i-th row_bytes of `out`.
  m.def(
      "engine_read_rows(Tensor(a!) out, Tensor rows, int engine, int file, int offset, "
      "int row_bytes, int num_rows) -> ()");
  m.def("engine_map(int engine, int file, int offset, int nbytes) -> Tensor");
  // Mode "gds": the next read into device memory, as ticket, file, offset, nbytes and address;
  // blocks. Nothing when there will be none. Bytes read, or -errno and a text, answer it.
  m.def("external_take(int engine) -> int[]");
  m.def("external_answer(int engine, int ticket, int result, str text) -> ()");
  m.def("external_abandon(int engine, str reason) -> ()");
  // Files that still arrive: file, offset, nbytes of what is there.
  m.def("engine_announce(int engine, int[] spans) -> ()");
  m.def("engine_settle(int engine, int file, int mtime_ns) -> ()");
  // `why`: "nexus:Class: what happened".
  m.def("engine_end_arrival(int engine, str why) -> ()");
  m.def("engine_refuse(int engine, str why) -> ()");
  m.def("engine_stats(int engine) -> str");
  m.def("engine_close(int engine) -> ()");

  // Fills `out` (uint8) from byte `offset` of a file; digests: int64, XXH3-64 of each `block_bytes`
  // of it. Blocks. Answers int64 [8]: a bad block or -1; errno of its read, ENODATA at the end of
  // the file, 0 where its bytes differ; is_direct; is_ring; bytes_staged; num_plain; num_second;
  // num_faults. stamp: device, inode, size, mtime_ns. faults: as engine_open's.
  m.def(
      "read_blocks_(Tensor(a!) out, str path, int[] stamp, int offset, Tensor digests, "
      "int block_bytes, str io, bool allow_uring, int depth, int[] faults) -> Tensor");
  // Pure: XXH3-64 of every `block_bytes` of the parts (uint8), laid behind one another; at least
  // one part.
  m.def("block_digests(Tensor[] parts, int block_bytes) -> Tensor");

  m.def(
      "measure_read(str path, str io, bool allow_uring, int depth, int chunk_bytes, "
      "int max_bytes) -> str");
  // Overwrites `arena` (uint8), whose memory is the device's.
  m.def("measure_copy(Tensor(a!) arena, str device, int chunk_bytes, int max_bytes) -> str");
  m.def("cached_bytes(str path) -> int");
  m.def("xxh3(Tensor data) -> int");
  // Whether this build can talk to a profiler.
  m.def("has_nvtx() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(nexus, CPU, m) {
  m.impl("acquire_", TORCH_BOX(&nexus::acquire_));
  m.impl("acquire_.held", TORCH_BOX(&nexus::acquire_held_));
  m.impl("release_", TORCH_BOX(&nexus::release_));
  m.impl("measure_copy", TORCH_BOX(&nexus::copy_rate));
  m.impl("engine_read_rows", TORCH_BOX(&nexus::engine_read_rows));
  m.impl("xxh3", TORCH_BOX(&nexus::xxh3));
  m.impl("read_blocks_", TORCH_BOX(&nexus::read_blocks_op));
  m.impl("block_digests", TORCH_BOX(&nexus::block_digests));
}

STABLE_TORCH_LIBRARY_IMPL(nexus, CUDA, m) {
  m.impl("acquire_", TORCH_BOX(&nexus::acquire_));
  m.impl("acquire_.held", TORCH_BOX(&nexus::acquire_held_));
  m.impl("release_", TORCH_BOX(&nexus::release_));
  m.impl("measure_copy", TORCH_BOX(&nexus::copy_rate));
}

STABLE_TORCH_LIBRARY_IMPL(nexus, CompositeExplicitAutograd, m) {
  m.impl("engine_open", TORCH_BOX(&nexus::engine_open));
  m.impl("engine_attach", TORCH_BOX(&nexus::engine_attach));
  m.impl("engine_set_digests", TORCH_BOX(&nexus::engine_set_digests));
  m.impl("engine_digest", TORCH_BOX(&nexus::engine_digest));
  m.impl("engine_group_id", TORCH_BOX(&nexus::engine_group_id));
  m.impl("engine_wait", TORCH_BOX(&nexus::engine_wait));
  m.impl("engine_place", TORCH_BOX(&nexus::engine_place));
  m.impl("engine_collect", TORCH_BOX(&nexus::engine_collect));
  m.impl("engine_evict", TORCH_BOX(&nexus::engine_evict));
  m.impl("caller", TORCH_BOX(&nexus::this_caller));
  m.impl("engine_end_pass", TORCH_BOX(&nexus::engine_end_pass));
  m.impl("engine_prefault", TORCH_BOX(&nexus::engine_prefault));
  m.impl("engine_map", TORCH_BOX(&nexus::engine_map));
  m.impl("external_take", TORCH_BOX(&nexus::external_take));
  m.impl("external_answer", TORCH_BOX(&nexus::external_answer));
  m.impl("external_abandon", TORCH_BOX(&nexus::external_abandon));
  m.impl("engine_announce", TORCH_BOX(&nexus::engine_announce));
  m.impl("engine_settle", TORCH_BOX(&nexus::engine_settle));
  m.impl("engine_end_arrival", TORCH_BOX(&nexus::engine_end_arrival));
  m.impl("engine_refuse", TORCH_BOX(&nexus::engine_refuse));
  m.impl("engine_stats", TORCH_BOX(&nexus::engine_stats));
  m.impl("engine_close", TORCH_BOX(&nexus::engine_close));
  m.impl("use_codec", TORCH_BOX(&nexus::use_codec));
  m.impl("measure_read", TORCH_BOX(&nexus::measure));
  m.impl("cached_bytes", TORCH_BOX(&nexus::file_cached_bytes));
  m.impl("has_nvtx", TORCH_BOX(&nexus::has_nvtx));
}
