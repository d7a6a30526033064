"""The faults that `make mutants` plants, one at a time: data for tests/mutants.py.

Each is an exact text that occurs once in its file, and what it is replaced with. A text that is no longer found stops
the run before it begins: whoever changes that line moves the fault along. Short texts rot least.

`tests` names the part of the suite that is run, with the tests most likely to see the fault first.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """One fault: `old` becomes `new` in `file`."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    isa: str = "portable"  # what is built and run; faults in paired products need avx512_bf16, in tiles amx_bf16


def _selection(files: str, keywords: str) -> tuple[str, ...]:
    return (*(f"tests/{name}.py" for name in files.split()), "-k", keywords)


# One instruction set and one type are enough for what is written once for all of them.
_PORTABLE = "portable and not bfloat16 and not float16"
_KERNEL = _selection("test_conformance test_masks test_cpu_native test_cpu_memory", _PORTABLE)
_MASK = _selection("test_masks test_conformance", f"definition or ({_PORTABLE})")
_POISON = _selection("test_cpu_poison test_conformance", _PORTABLE)
_PAIRED = _selection("test_conformance", "avx512_bf16 and bfloat16")
_TILES = _selection("test_conformance", "amx_bf16 and bfloat16")
_LINEAR = _selection("test_linear", "portable")
_LINEAR_TILES = _selection("test_linear", "amx_bf16 and bfloat16")
_DECODE = _selection("test_conformance", "avx2 and decode")
_POINTWISE = _selection("test_pointwise", "portable and (gelu or entropy)")
_PACKED = _selection("dropin/test_linears", "not compiled and not models and not tracing")
_ROTARY = _selection("dropin/test_pointwise", "rotary or angles or rotation or gates or dense")
_TRAINING = _selection("dropin/test_training", "not compiler")
_STACK = _selection("models/test_stack", "hooks or part or last or checkpoint")
_CACHE = _selection("models/test_stack models/test_cache", "padded or shorter")
_THREADS = _selection("test_cpu_native", "same_bits and float32")
_DATA = _selection("test_arguments", "data_out_of_range")
_ROWS = _selection("test_arguments", "rejects")
_DROPOUT = _selection("test_dropout test_conformance", _PORTABLE)
_OPS = _selection("test_ops test_transforms", "not opcheck and not compiled and not finite and not exported")
_OPCHECK = _selection("test_ops", "opcheck or fake")
_AUTOCAST = _selection("test_ops", "autocast and not compiled")
_PAGED = _selection("test_paged", "paged")
_PAGES = _selection("test_conformance test_paged", f"paged and {_PORTABLE} or pages")
_LAYOUT = _selection("test_cpu_memory test_ops test_conformance", f"views or order or ({_PORTABLE})")

_CORE, _CPU, _HOST = "csrc/core/", "csrc/cpu/", "csrc/cpu/host/"
_PACKAGE = "transformer_fast/"

MASK = [
    Fault("window: one key too few on the left", _CORE + "mask.h",
          "max_of(mask.start, position - mask.left)", "max_of(mask.start, position - mask.left + 1)", _MASK),
    Fault("window: one key too many on the right", _CORE + "mask.h",
          "min_of(mask.end, position + mask.right + 1)", "min_of(mask.end, position + mask.right + 2)", _MASK),
    Fault("tile range: all rows are said to see what the first row sees", _CORE + "mask.h",
          "full_begin = max_of(mask.start, last - mask.left)", "full_begin = max_of(mask.start, first - mask.left)",
          _KERNEL),
    Fault("tile range: ends with the first row", _CORE + "mask.h",
          "end = min_of(mask.end, last + mask.right + 1)", "end = min_of(mask.end, first + mask.right + 1)", _KERNEL),
    Fault("alignment: top-left", _HOST + "sequences.cpp", "s.len_k - s.len_q, p.left", "0, p.left", _KERNEL),
    Fault("alignment: key lengths do not move it", _HOST + "sequences.cpp",
          "s.len_k - s.len_q, p.left", "(p.packed ? s.len_k : p.seqlen_k) - s.len_q, p.left", _KERNEL),
    Fault("key lengths: always the first entry's", _HOST + "sequences.cpp",
          "p.seqlens_k[b * p.seqlens_k_stride]", "p.seqlens_k[0]", _KERNEL),
    Fault("key padding mask: ignored", _HOST + "sequences.cpp",
          "if (p.key_mask != nullptr) apply_key_mask(p, s);", "", _KERNEL),
    Fault("key padding mask: holes ignored", _HOST + "sequences.cpp",
          "s.holes = !row[j * p.key_mask_key]", "s.holes = false", _KERNEL),
    Fault("key padding mask: left padding seen", _HOST + "sequences.cpp", "s.mask.start = first;", "", _KERNEL),
    Fault("dense mask: summary one key short at the row's end", _HOST + "sequences.cpp",
          "return set(i, first, keys, true);", "return set(i, first, keys - 1, true);", _KERNEL),
    Fault("dense mask: rows with holes called solid", _HOST + "sequences.cpp",
          "set(i, first, last, false);", "set(i, first, last, true);", _KERNEL),
    Fault("dense mask: bytes not read where there are holes", _CPU + "tile.h", " && !reads_mask[v];", ";", _KERNEL),
    Fault("edge blocks: one key more than a row sees", _CPU + "tile.h", "(last > key)", "(last >= key)", _KERNEL),
    Fault("edge blocks: forward leaves them unmasked", _CPU + "forward.cpp",
          "if (masked) tile.apply_mask(", "if (false) tile.apply_mask(", _KERNEL),
    Fault("edge blocks: backward leaves them unmasked", _CPU + "backward.cpp",
          "if (masked) tile.apply_mask(", "if (false) tile.apply_mask(", _KERNEL),
    Fault("decode: sees keys past the row's end", _CPU + "decode.cpp",
          "seen.lo <= j && j < seen.hi", "seen.lo <= j", _KERNEL),
    Fault("decode: keys of the group's first head only", _HOST + "forward.cpp",
          "head < (kv_head + 1) * p.group_size", "head < kv_head * p.group_size + 1", _KERNEL),
    Fault("dense mask: holes taken for whole blocks", _CPU + "tile.h",
          "first_visible(bytes, lo, hi) < hi", "first_visible(bytes, lo, hi) < lo", _KERNEL),
    Fault("packed: keys begin where the queries begin", _HOST + "sequences.cpp",
          "s.first_key = p.packed ? p.cu_seqlens_k[b]", "s.first_key = p.packed ? p.cu_seqlens_q[b]", _KERNEL),
    Fault("packed: lse of a head begins at another's", _CORE + "params.h",
          "head * total_q + first_row + row", "head * seqlen_q + first_row + row", _KERNEL),
]  # fmt: skip

SOFTMAX = [
    Fault("online softmax: accumulator not rescaled", _CPU + "forward.cpp",
          "store(o, load(o) * shrink);", "store(o, load(o));", _KERNEL),
    Fault("online softmax: sum not rescaled", _CPU + "forward.cpp",
          "load(row_sum + v * kLanes) * shrink", "load(row_sum + v * kLanes)", _KERNEL),
    Fault("sink: not in the sum", _CPU + "forward.cpp",
          "const F total = l * shrink +", "const F total = l * shrink + 0.0f *", _KERNEL),
    Fault("lse: base 2 given out as natural", _CPU + "tile.h", "top * p.score_natural()", "top", _KERNEL),
    Fault("lse: the maximum from before the sink", _CPU + "forward.cpp",
          "select(empty, set1(-kInfinity), safe)", "m", _KERNEL),
    Fault("statistics: planes swapped", _CPU + "backward.cpp",
          "row_max[lane] = p.stats[at];\n                row_inverse[lane] = p.stats[plane + at];",
          "row_max[lane] = p.stats[plane + at];\n                row_inverse[lane] = p.stats[at];", _KERNEL),
    Fault("decode: chunks joined without their weight", _CPU + "combine.cpp",
          "sum += partial[1] * weight[0];", "sum += partial[1];", _KERNEL),
    Fault("decode: sum not rescaled", _CPU + "decode.cpp", "state[1] *= shrink;", "", _KERNEL),
    Fault("decode: heads of a group in the wrong order", _CPU + "decode.cpp",
          "chunk.kv_head * p.group_size + r % p.group_size",
          "chunk.kv_head + r % p.group_size * p.num_kv_heads", _KERNEL),
    Fault("grouped heads: interleaved instead of side by side", _CPU + "tile.h",
          "kv_head * p.group_size + member", "kv_head + member * p.num_kv_heads", _KERNEL),
    Fault("NaN in a value: lost where it is seen", _CPU + "forward.cpp",
          "if (block.dirty) add_dirty_values(v0, count, k0, k1);", "", _POISON),
    Fault("NaN in a value: reaches rows that do not see it", _CPU + "forward.cpp",
          "hides && j < end - begin && !dirty", "hides && j < 0 && !dirty", _POISON),
    Fault("NaN in a key: its dP reaches the rows that do not see it", _CPU + "backward.cpp",
          "if (hides) gradient = select(", "if (false) gradient = select(", _POISON),
    Fault("paired products: an odd last key counted twice", _CPU + "forward.cpp",
          "if (keys % 2 == 1) exponentials(std::false_type{});", "if (keys % 2 == 1) exponentials(std::true_type{});",
          _PAIRED, "avx512_bf16"),
    Fault("paired products: decoding takes half of V's columns twice", _CPU + "pack.h",
          "_mm512_unpackhi_epi16(a, b)", "_mm512_unpacklo_epi16(a, b)", _PAIRED, "avx512_bf16"),
    Fault("paired products: decoding leaves V's columns in turn", _CPU + "decode.cpp",
          "in_order(state_of(r) + 2);", ";", _PAIRED, "avx512_bf16"),
    Fault("backward: lanes past the rows have infinite weights", _CPU + "backward.cpp",
          "minimum(set1(16.0f), (load(s) - top) * factor)", "(load(s) - top) * factor", _PAIRED, "avx512_bf16"),
    Fault("paired products: a segment begins inside a pair", _CPU + "tile.h",
          "seen.lo -= (seen.lo - n0) & 1;", "", _PAIRED, "avx512_bf16"),
    Fault("paired products: dS of the second key lost", _CPU + "backward.cpp",
          "j + 1 < keys ? load(dscores + at + kRows)", "j + 1 < 0 ? load(dscores + at + kRows)",
          _PAIRED, "avx512_bf16"),
]  # fmt: skip

TILES = [
    Fault("tiles: a shape for fewer rows kept for more", _CPU + "amx.h",
          "rows != wanted_rows || ", "", _TILES, "amx_bf16"),
    Fault("tiles: what is left of the depth taken for whole", _CPU + "amx.h",
          "(wanted_tail != 0 && tail != wanted_tail)", "false", _TILES, "amx_bf16"),
    Fault("tiles: C not continued", _CPU + "amx.h",
          "if constexpr (kAdd) {\n            tile_load<v>", "if constexpr (false) {\n            tile_load<v>",
          _TILES, "amx_bf16"),
    Fault("tiles: V's columns left in the order of the instruction", _CPU + "pack.h",
          "(c + i / 4 * 8 + half * 4 + i % 4)", "(c + half * 16 + i)", _TILES, "amx_bf16"),
    Fault("tiles of a task: blocks begin with the first tile's keys", _CPU + "forward.cpp",
          "keys.lo -= (keys.lo - sequence.mask.start) % kKeys;", "", _THREADS),
    Fault("tiles of a task: a block loaded for all is not looked at for some", _CPU + "forward.cpp",
          "if (loaded && (checked || !hides)) return;", "if (loaded) return;", _POISON),
    Fault("tiles of a task: the first one's keys are all that is visited", _CPU + "forward.cpp",
          "max_of(keys.hi, seen.hi)}", "keys.hi}", _KERNEL),
]  # fmt: skip

LINEAR = [
    Fault("linear: a block of depth replaces the ones before", _CPU + "linear.cpp",
          "multiply<P, Product, true>(a + k * 4", "multiply<P, Product, false>(a + k * 4", _LINEAR),
    Fault("linear: what stands beside a weight taken to fill up a pair", _CPU + "linear.cpp",
          "n < w.out_features && i < w.in_features", "n < w.out_features", _LINEAR_TILES, "amx_bf16"),
    Fault("linear: a gate's value read where the gate is", _CPU + "linear.cpp",
          "load(sum + panel)", "load(sum)", _LINEAR),
    Fault("linear: the residual's rows one stride off", _CPU + "linear.cpp",
          "(first_row + r) * p.residual_row + first", "(first_row + r) * p.out_features + first", _LINEAR),
    Fault("linear: the value's bias left out", _CPU + "linear.cpp",
          " + bias_at(p.value_bias, i, count)", "", _LINEAR),
    Fault("linear: rows not widened anew", _CPU + "linear.cpp",
          "p.x + (first_row + r) * p.x_row * kSize", "p.x + r * p.x_row * kSize", _LINEAR),
    Fault("linear: the last run of panels left out", _HOST + "linear.cpp",
          "panels * (run + 1) / runs,", "panels * (run + 1) / (runs + 1),", _LINEAR),
    Fault("linear: rows that are no whole tile left out", _HOST + "linear.cpp",
          "return std::min(ceil_div(rows, tile) * block / count * tile, rows);",
          "return rows / tile * block / count * tile;", _LINEAR),
    Fault("linear: every block of a pair reads the first rows", _HOST + "linear.cpp",
          "a.x += begin * a.x_row * size;", "", _LINEAR),
    Fault("linear: a pair's residual of the first rows", _HOST + "linear.cpp",
          "if (b.residual) b.residual += begin * b.residual_row * size;", "", _LINEAR),
    Fault("linear: rows are not filled up to whole tiles", _CPU + "linear.cpp",
          "p.in_features % LinearProduct<kType>::kPad != 0 || ", "", _LINEAR_TILES, "amx_bf16"),
    Fault("matrices: a part of the depth replaces the ones before", _HOST + "linear.cpp",
          "if (k > 0) {", "if (k < 0) {", _LINEAR),
    Fault("matrices: a part of the depth summed where the ones before lie", _CPU + "linear.cpp",
          " && p.residual != p.out", "", _LINEAR),
    Fault("linear: what is left of a panel summed in place as a whole one", _CPU + "linear.cpp",
          "p.out_features / kPanel)", "ceil_div(p.out_features, kPanel))", _LINEAR),
    Fault("linear: nothing follows a product in place but a bias", _CPU + "linear.cpp",
          "if (p.bias || p.residual || p.activation != Linear::none)", "if (p.bias)", _LINEAR),
    Fault("matrices: every part of the columns is the first", _HOST + "linear.cpp",
          "(k * p.b_row + n * p.b_column) * 4", "k * p.b_row * 4", _LINEAR),
    Fault("matrices: the first columns' bias", _HOST + "linear.cpp", "l.bias = p.bias + n * 4;", "l.bias = p.bias;",
          _LINEAR),
    Fault("matrices: rows that are turned are the first block's", _CPU + "linear.cpp",
          "reinterpret_cast<const float*>(p.x) + first_row;", "reinterpret_cast<const float*>(p.x);", _LINEAR),
    Fault("matrices: a whole panel of the first outputs", _CPU + "linear.cpp",
          "reinterpret_cast<const float*>(weight) + first * w.out_stride;", "reinterpret_cast<const float*>(weight);",
          _LINEAR),
    Fault("training: a gradient that is differentiated again is a constant", _PACKAGE + "dropin/training.py",
          "is_plain_inference(a, b, bias)\n        and", "", _TRAINING),
    Fault("training: other bits tomorrow though the same were asked for", _PACKAGE + "dropin/training.py",
          "and not torch.are_deterministic_algorithms_enabled()", "", _TRAINING),
    Fault("training: the gradient of a weight by columns in another order", _PACKAGE + "dropin/training.py",
          "by_columns = weight.stride(0) == 1 != weight.stride(1)", "by_columns = False", _TRAINING),
    Fault("training: the rows kept though no gradient needs them", _PACKAGE + "dropin/training.py",
          "x if needs_weight else None,", "x,", _TRAINING),
    Fault("training: saved tensors taken for what was saved", _PACKAGE + "dropin/training.py",
          "and a.dtype is b.dtype is torch.float32\n", "\n", _TRAINING),
    Fault("training: many gradients at once taken for one", _PACKAGE + "ops.py",
          "tensor._is_zerotensor() or is_legacy_batchedtensor(tensor)", "tensor._is_zerotensor()", _TRAINING),
    Fault("blocks: who listens to the final norm hears the last rows alone", _PACKAGE + "models/stack.py",
          "(self.final_norm, self.final_dropout)", "(self.final_dropout,)", _STACK),
    Fault("blocks: one context for all, with the last one's rows", _PACKAGE + "models/stack.py",
          "contexts[-1] = replace(context, last_only=True)", "context.last_only = True", _STACK),
    Fault("blocks: rows left out under an attention that knows nothing of it", _PACKAGE + "models/stack.py",
          " and type(block.attention) is Attention", "", _STACK),
    Fault("linear: lower tiles multiply the upper rows", _CPU + "amx.h",
          "lower_a = a + kSide * a_stride", "lower_a = a", _LINEAR_TILES, "amx_bf16"),
    Fault("activations: GELU's tail on the wrong side", _CPU + "activations.h",
          "select(x < 0.0f, below, 1.0f - below)", "select(x > 0.0f, below, 1.0f - below)", _LINEAR),
    Fault("activations: GELU by the tanh's constant", _CPU + "activations.h",
          "x + 0.044715f * (x * x * x)", "x + 0.0447f * (x * x * x)", _LINEAR),
    Fault("activations: GELU's slope without the cube's", _CPU + "activations.h",
          "1.595769122f + 0.214064453f * square", "1.595769122f", _POINTWISE),
    Fault("loss: rows that do not count have a gradient", _CPU + "pointwise.cpp",
          "if (label == c.ignored) {", "if (false) {", _POINTWISE),
    Fault("loss: the largest logit taken for 0", _CPU + "pointwise.cpp",
          "const float top = largest(tops);", "const float top = 0.0f * largest(tops);", _POINTWISE),
    Fault("loss: logits past the last one counted", _CPU + "pointwise.cpp",
          "x[i] = -kInfinity;", "x[i] = 0.0f;", _POINTWISE),
    Fault("linear: few rows of a widened weight by the other type", _CPU + "gemm.h",
          "return load_as_float<kType>(reinterpret_cast<const char*>(p));",
          "return load_as_float<DType::f16>(reinterpret_cast<const char*>(p));", _LINEAR),
    Fault("decode: of three rows that are left two are done", _CPU + "decode.cpp",
          "fn(std::integral_constant<int, kMost>{})", "fn(std::integral_constant<int, kMost == 3 ? 2 : kMost>{})",
          _DECODE, "avx2"),
    Fault("activations: ReLU hides NaN", _CPU + "linear.cpp",
          "select(x < 0.0f, zero(), x)", "select(x > 0.0f, x, zero())", _LINEAR),
    Fault("packed: a changed weight goes unseen", _PACKAGE + "dropin/linears.py",
          "or weight._version != version", "", _PACKED),
    Fault("packed: a weight laid out for another instruction set", _PACKAGE + "dropin/linears.py",
          "or cpu_linear.instruction_set() != self.isa", "", _PACKED, "avx512_bf16"),
    Fault("packed: the residual forgotten where the kernel does not take it", _PACKAGE + "dropin/linears.py",
          "return out if residual is not None or self.residual is None else self.residual + out", "return out",
          _PACKED),
    Fault("rotary: angles of unequal halves taken for Llama's", _PACKAGE + "dropin/pointwise.py",
          "repeats = torch.equal(*angles.chunk(2, dim=-1))", "repeats = True", _ROTARY),
    Fault("blocks: a hook on a layer hears the residual", _PACKAGE + "models/stack.py",
          " and not is_heard(layer):", ":", _STACK),
    Fault("cache: the slot of a padded sequence's next token by its grid", _PACKAGE + "generation/cache.py",
          " and layout.key_padding_mask is None\n        slot", "\n        slot", _CACHE),
    Fault("cache: the slot of a sequence chosen from others by the longest", _PACKAGE + "generation/cache.py",
          "self._is_exact and layout.batch == 1 and", "self._is_exact and", _CACHE),
    Fault("gates: a hook on a packed layer is not heard", _PACKAGE + "linear.py",
          " and not is_heard(layer) else None", " else None", _ROTARY),
]  # fmt: skip

OPTIONS = [
    Fault("ALiBi: sign", _CPU + "tile.h", "x -= alibi_v *", "x += alibi_v *", _KERNEL),
    Fault("ALiBi: distance without the offset", _CPU + "tile.h",
          "position[lane] + s.mask.offset - k0", "position[lane] - k0", _KERNEL),
    Fault("softcap: no derivative", _CPU + "backward.cpp",
          "if (p.softcap != 0.0f) through_softcap(", "if (false) through_softcap(", _KERNEL),
    Fault("softcap: wrong derivative", _CPU + "tile.h", "1.0f - t * t", "1.0f - t", _KERNEL),
    Fault("dbias: taken after the softcap's derivative", _CPU + "backward.cpp",
          "if (p.dbias != nullptr) add_dbias(v0, count, k0, k1);",
          "if (p.dbias != nullptr && p.softcap != 0.0f) through_softcap(v0, count, keys);\n"
          "        if (p.dbias != nullptr) add_dbias(v0, count, k0, k1);",
          _KERNEL),
    Fault("dropout: words of a counter in another order", _CPU + "tile.h",
          "cache[w * kLanes + i] =", "cache[(3 - w) * kLanes + i] =", _DROPOUT),
    Fault("dropout: half the threshold", _CPU + "tile.h",
          "p.dropout_p * 4294967296.0", "p.dropout_p * 2147483648.0", _DROPOUT),
    Fault("dropout: one mask for the whole batch", _CPU + "tile.h", "static_cast<uint32_t>(s.index)", "0u", _DROPOUT),
    Fault("dropout: kept ones not scaled up", _CPU + "tile.h", "1.0 / (1.0 - p.dropout_p)", "1.0", _DROPOUT),
    Fault("dropout: taken out of the sum as well", _CPU + "forward.cpp",
          "sum += e;\n            e *= tile.dropout_factor(v, j, cache, cached);",
          "e *= tile.dropout_factor(v, j, cache, cached);\n            sum += e;", _DROPOUT),
    Fault("dropout: backward forgets it in dP", _CPU + "backward.cpp", "gradient = gradient * factor;", "", _DROPOUT),
]  # fmt: skip

BACKWARD = [
    Fault("delta: gradient of lse left out", _CPU + "backward.cpp", "delta[lane] -= p.dlse[at];", ";", _KERNEL),
    Fault("dq: not scaled", _CPU + "backward.cpp",
          "p.head_dim, p.softmax_scale, to)", "p.head_dim, 1.0f, to)", _KERNEL),
    Fault("dk: not scaled", _HOST + "backward.cpp",
          "parts, p.head_dim, p.softmax_scale, sum", "parts, p.head_dim, 1.0f, sum", _KERNEL),
    Fault("dk, dv: stored as if every run began with its block", _CPU + "backward.cpp",
          "at = k0 - run_.key_begin", "at = k0 - block.begin", _KERNEL),
    Fault("dk, dv: a slice of keys not stored", _HOST + "backward.cpp",
          "keys * (slice + 1) / parts);", "keys * (slice + 1) / parts - (slice + 1 < parts));", _KERNEL),
    Fault("dk, dv: accumulators not cleared", _HOST + "backward.cpp",
          "std::memset(run.dkey, 0, static_cast<size_t>(widths.floats(run)) * 4);", "", _KERNEL),
    Fault("dk, dv: only the first part of a head counts", _CPU + "backward.cpp",
          "if (part_count == 1) return", "if (part_count >= 1) return", _KERNEL),
]  # fmt: skip

ADAPTER = [
    Fault("adapter: window sides swapped", _PACKAGE + "backends/fields.py",
          "masks.bounds(options.window_left, options.window_right)",
          "masks.bounds(options.window_right, options.window_left)", _KERNEL),
    Fault("adapter: bias not broadcast", _PACKAGE + "layout.py",
          "return tuple(0 if n == 1 else s for n, s in", "return tuple(s for n, s in", _KERNEL),
    Fault("adapter: out written with the query's strides", _PACKAGE + "backends/fields.py",
          '"out": row_strides(out_stride, packed)', '"out": row_strides(query.stride, packed)', _KERNEL),
    Fault("adapter: slopes of a batch read with one stride", _PACKAGE + "backends/fields.py",
          "(0, *slopes.stride)[-2:]", "(0, *slopes.stride)[:2]", _KERNEL),
    Fault("adapter: statistics and lse swapped", _PACKAGE + "backends/cpu.py",
          "*map(_pointer, (out, lse, stats)),", "*map(_pointer, (out, stats, lse)),", _KERNEL),
    Fault("adapter: sign of dsinks", _PACKAGE + "backends/gradients.py",
          "return -(share", "return (share", _KERNEL),
    Fault("adapter: gradient of lse not made contiguous", _PACKAGE + "backends/gradients.py",
          "else _numbers(dlse)", "else dlse.to(torch.float32)", _LAYOUT),
    Fault("adapter: expanded gradient of out taken as it is", _PACKAGE + "backends/gradients.py",
          "if dout.stride(-1) != 1 and dout.shape[-1] > 1:", "if False:", _KERNEL),
    Fault("memory order: heads before rows for everybody", _PACKAGE + "layout.py",
          'order != "bhsd" or stride[1] < stride[2]', 'order != "bhsd"', _OPS),
]  # fmt: skip

PYTHON = [
    Fault("spec: causal forgets a window's right side", _PACKAGE + "spec.py",
          "return sides[0], (0 if causal else sides[1])", "return sides[0], sides[1]",
          _selection("test_conformance", "plain_computation")),
    Fault("spec: shape of the bias not checked", _PACKAGE + "spec.py",
          "_require(fits,", "_require(True or fits,", _ROWS),
    Fault("spec: strided rows not refused", _PACKAGE + "spec.py",
          "tensor.stride(-1) == 1 or", "True or tensor.stride(-1) == 1 or", _ROWS),
    Fault("spec: int64 key lengths let through", _PACKAGE + "spec.py",
          '"seqlens_k", operands.query, (torch.int32,)', '"seqlens_k", operands.query, (torch.int32, torch.int64)',
          _ROWS),
    Fault("spec: dropout of everything let through", _PACKAGE + "spec.py",
          "0.0 <= dropout_p < 1.0", "0.0 <= dropout_p <= 1.0", _ROWS),
    Fault("spec: the reference does not look at key lengths", _PACKAGE + "spec.py",
          "0 <= length <= spec.seqlen_k", "0 <= length", _DATA),
    Fault("native: offsets that do not begin at 0 let through", _HOST + "sequences.cpp",
          "require(cu[0] == 0,", "require(true,", _DATA),
    Fault("ops: checks remembered without strides", _PACKAGE + "ops.py",
          "(query.shape, query.stride(), query.dtype, query.device)", "(query.shape, query.dtype, query.device)", _OPS),
    Fault("ops: slopes that require grad remembered as right", _PACKAGE + "ops.py",
          "slopes is not None and slopes.requires_grad and torch.is_grad_enabled(),", "False,",
          _selection("test_arguments", "slopes")),
    Fault("ops: autocast dropped", _PACKAGE + "ops.py",
          "        operands = autocast_operands(operands)\n    if options", "        pass\n    if options", _AUTOCAST),
    Fault("ops: fake rule promises other strides", _PACKAGE + "ops.py",
          "return new_output(query, operands.value.shape[-1]), lse, stats",
          "return new_output(query.contiguous(), operands.value.shape[-1]), lse, stats", _OPCHECK),
    Fault("ops: fake rule promises lse in the query's type", _PACKAGE + "ops.py",
          "dtype=torch.promote_types(query.dtype, torch.float32))", "dtype=query.dtype)", _OPCHECK),
    Fault("ops: vmap folds the batch in front", _PACKAGE + "ops.py",
          "return tensor.flatten(0, 1)", "return tensor.transpose(0, 1).flatten(0, 1)", _OPS),
    Fault("ops: dbias never asked for", _PACKAGE + "ops.py",
          "dbias=needs[_BIAS], dsinks=needs[_SINKS])", "dbias=False, dsinks=needs[_SINKS])", _KERNEL),
    Fault("ops: a second derivative is a constant", _PACKAGE + "ops.py",
          "if torch.is_grad_enabled() or any(", "if any(", _OPS),
    Fault("ops: what backward needs may be overwritten", _PACKAGE + "ops.py",
          "ctx.save_for_backward(*tensors, *results)",
          "ctx.save_for_backward(*[t.data for t in tensors], *results)",
          _selection("test_cpu_memory", "overwritten")),
    Fault("reference: key lengths do not move the alignment", _PACKAGE + "masks.py",
          "+ (end - seqlen_q)", "+ (seqlen_k - seqlen_q)",
          _selection("test_masks test_conformance", "definition or plain")),
    Fault("reference: bias before the softcap", _PACKAGE + "reference.py",
          "    if options.softcap is not None:\n",
          "    if bias is not None:\n        scores, bias = scores + bias.to(dtype), None\n"
          "    if options.softcap is not None:\n",
          _selection("test_conformance", "plain_computation")),
    Fault("reference: a sink that gives a value", _PACKAGE + "reference.py",
          "lse = torch.logsumexp(logits, dim=-1)", "lse = torch.logsumexp(logits[..., :seqlen_k], dim=-1)",
          _selection("test_conformance", "plain_computation")),
]  # fmt: skip

PAGED = [
    Fault("paged: a run of keys goes on past its page", _CPU + "key_rows.h",
          "min_of(end - begin, p.page_size - row)", "end - begin", _PAGES),
    Fault("paged: counted from a sequence's first page", _CPU + "key_rows.h",
          "int64_t index = begin / p.page_size,", "int64_t index = 0,", _PAGES),
    Fault("paged: a run begins at its page's first row", _CPU + "key_rows.h",
          "row = begin % p.page_size;", "row = 0;", _PAGES),
    Fault("paged: every entry of a table beside the one before", _CORE + "params.h",
          "index * block_table_page", "index", _PAGES),
    Fault("paged: the first sequence's table for all", _CORE + "params.h", "b * block_table_batch + ", "", _PAGES),
    Fault("paged: pages brought together one over the other", _CPU + "forward.cpp",
          "(run.first - begin + j) * pitch(columns)", "j * pitch(columns)", _PAGES),
    Fault("paged: NaN in a value taken from another page", _CPU + "key_rows.h",
          "for_each_run(p, s, j, j + 1,", "for_each_run(p, s, 0, 1,", _selection("test_paged", "dirty")),
    Fault("paged: the page after the last one let through", _HOST + "sequences.cpp",
          "page < p.num_pages)", "page <= p.num_pages)", _PAGED),
    Fault("paged: entries past a sequence's keys looked at", _HOST + "sequences.cpp",
          "i < ceil_div(s.len_k, p.page_size)", "i < p.seqlen_k / p.page_size", _PAGES),
    Fault("paged: the reference does not look at the table", _PACKAGE + "spec.py",
          "0 <= page < num_pages,", "True,", _PAGED),
    Fault("paged: a query that requires grad remembered as right", _PACKAGE + "ops.py",
          "operands.block_table is not None and _takes_gradient(operands),", "False,", _PAGED),
    Fault("paged: the op takes what requires grad", _PACKAGE + "ops.py",
          "with torch.enable_grad():  # which", "if True:  # which", _PAGED),
    Fault("paged: autocast copies the cache", _PACKAGE + "ops.py",
          'names, dtype = ("query",), operands.key.dtype', "pass", _PAGED),
]  # fmt: skip

FAULTS = [*MASK, *SOFTMAX, *TILES, *LINEAR, *OPTIONS, *BACKWARD, *ADAPTER, *PYTHON, *PAGED]
