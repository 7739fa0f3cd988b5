"""Counts are right for programs small enough to count by hand: compiled for eight CPU devices, or as on TPUs and GPUs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from mc3_jax import hlo, hlo_text


def compiled(function, *shapes, **options) -> hlo.Counts:
    """Returns the counts for a function that is compiled for float32 arguments of these shapes."""
    arguments = [s if isinstance(s, jax.ShapeDtypeStruct) else jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return hlo.count(jax.jit(function, **options).lower(*arguments).compile().as_text())


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize(
    ("function", "shapes", "flops"),
    [
        (lambda x, y: x @ y, [(8, 16), (16, 4)], 2 * 8 * 16 * 4),
        (lambda x, y: jnp.einsum("bij,bjk->bik", x, y), [(3, 8, 16), (3, 16, 4)], 2 * 3 * 8 * 16 * 4),
        (lambda x, y: jnp.einsum("bhqd,bhkd->bhqk", x, y), [(2, 3, 5, 7), (2, 3, 6, 7)], 2 * 2 * 3 * 5 * 6 * 7),
        (lambda x, y: jnp.tanh(x + y), [(8, 8), (8, 8)], 0),
    ],
)
def test_matrix_products_are_counted(function, shapes, flops):
    counts = compiled(function, *shapes)
    assert counts.flops == flops
    assert counts.unknown_loops == []


@pytest.mark.parametrize(
    ("stride", "padding", "hole", "kernel_hole", "groups"),
    [(1, (0, 0), 1, 1, 1), (2, (1, 2), 1, 1, 1), (1, (3, 3), 2, 1, 1), (1, (2, 0), 1, 2, 1), (1, (1, 1), 1, 1, 2)],
)
def test_convolutions_count_neither_padding_nor_holes(stride, padding, hole, kernel_hole, groups):
    options = {
        "window_strides": [stride], "padding": [padding], "lhs_dilation": [hole], "rhs_dilation": [kernel_hole],
        "feature_group_count": groups, "dimension_numbers": ("NWC", "WIO", "NWC"),
    }  # fmt: skip
    batch, length, size, into, out = 3, 11, 4, 6, 8
    shapes = (batch, length, into), (size, into // groups, out)
    products = 0  # by definition: an output position meets the kernel's positions that lie on a value of the input
    dilated = (length - 1) * hole + 1
    reach = (size - 1) * kernel_hole + 1
    for place in range((dilated + sum(padding) - reach) // stride + 1):
        for tap in range(size):
            at = place * stride + tap * kernel_hole - padding[0]
            products += 0 <= at < dilated and at % hole == 0
    text = jax.jit(lambda x, k: jax.lax.conv_general_dilated(x, k, **options)).lower(
        *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    )
    assert hlo.count(text.compiler_ir("hlo").as_hlo_text()).flops == 2 * batch * into // groups * out * products


def test_a_loop_counts_once_per_iteration_and_nested_loops_multiply():
    def inner(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    once = 2 * 8 * 16 * 16
    assert compiled(inner, (8, 16), (5, 16, 16)).flops == 5 * once
    counts = compiled(lambda x, w: jax.lax.fori_loop(0, 3, lambda _, x: inner(x, w), x), (8, 16), (5, 16, 16))
    assert counts.flops == 15 * once
    assert counts.unknown_loops == []


def test_trip_counts_are_read_from_the_condition_where_the_compiler_has_not_noted_them():
    def loop(x):
        return jax.lax.while_loop(lambda s: s[0] < 20, lambda s: (s[0] + 3, s[1] @ s[1]), (2, x))[1]

    text = jax.jit(loop).lower(jax.ShapeDtypeStruct((4, 4), jnp.float32)).compiler_ir("hlo").as_hlo_text()
    assert "known_trip_count" not in text
    assert hlo.count(text).flops == 6 * 2 * 4**3  # the counter is 2, 5, 8, 11, 14, 17


def test_a_loop_of_unknown_length_is_named_and_counts_once():
    counts = compiled(lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x), (4, 4))
    assert len(counts.unknown_loops) == 1
    assert counts.flops == 2 * 4**3


def test_the_gradient_of_a_scan_counts_its_backward_loop():
    def loss(w, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

    assert compiled(jax.grad(loss), (5, 16, 16), (8, 16)).flops == 3 * 5 * 2 * 8 * 16 * 16


def test_bytes_of_an_all_reduce(mesh):
    def rows(*axes):
        return NamedSharding(mesh, P(*axes))

    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=rows(("data", "fsdp")))
    w = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=rows())
    counts = compiled(jax.grad(lambda w, x: jnp.sum(jnp.sin(x @ w))), w, x)
    (exchange,) = counts.exchanges
    assert (exchange.kind, exchange.dtype, exchange.group_size, exchange.times) == ("all-reduce", "f32", 8, 1)
    assert exchange.num_bytes == counts.payload("all-reduce", "f32") == 16 * 32 * 4
    assert exchange.wire_bytes == 2 * 7 / 8 * 16 * 32 * 4
    assert counts.payload("all-reduce", "bf16") == counts.payload("all-gather") == 0


def test_bytes_of_an_all_gather_over_one_axis(mesh):
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    counts = compiled(lambda x: jnp.sin(x), x, out_shardings=NamedSharding(mesh, P()))
    (exchange,) = counts.exchanges
    assert (exchange.kind, exchange.group_size, exchange.num_bytes) == ("all-gather", 4, 64 * 16 * 4)
    assert exchange.wire_bytes == 3 / 4 * 64 * 16 * 4


def test_bytes_of_collectives_written_out_in_a_loop(mesh):
    def body(x):
        def once(x, _):
            x = jax.lax.psum_scatter(x, "data", tiled=True)
            return jax.lax.all_gather(jnp.sin(x), "data", tiled=True), None

        return jax.lax.scan(once, x, length=7)[0]

    function = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    counts = compiled(function, (64, 16))
    assert counts.payload("reduce-scatter") == counts.payload("all-gather") == 7 * 64 * 16 * 4
    assert {(e.kind, e.group_size, e.times) for e in counts.exchanges} == {("reduce-scatter", 4, 7), ("all-gather", 4, 7)}


def test_memory_traffic_is_what_instructions_read_and_write_and_only_the_slice_of_a_sliced_array():
    counts = compiled(lambda x, y: x @ y, (128, 256), (256, 64))
    assert counts.memory_bytes == 4 * (128 * 256 + 256 * 64 + 128 * 64)
    steps, row = 50, 4 * 1000

    def total(x):
        return jax.lax.fori_loop(0, steps, lambda i, s: s + jax.lax.dynamic_index_in_dim(x, i, keepdims=False), x[0])

    counts = compiled(total, (steps, 1000))
    # Each iteration reads a row and the sum and writes the sum. To read the whole array each time is 50 times as much.
    assert 3 * steps * row <= counts.memory_bytes <= 6 * steps * row


TPU = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%fused_convolution (p0: bf16[24,785,64], p1: bf16[24,785,64]) -> bf16[24,785,785] {
  %p0 = bf16[24,785,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[24,785,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %c = bf16[24,785,785]{2,1,0} convolution(%p0, %p1), window={size=24 stride=23 lhs_dilate=24}, dim_labels=0bf_0oi->0bf
}

%all-reduce-scatter.1 (p: f32[64,768]) -> f32[8,768] {
  %p = f32[64,768]{1,0:T(8,128)} parameter(0)
  %reduced = f32[64,768]{1,0:T(8,128)} all-reduce(%p), channel_id=3, replica_groups=[1,8]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %mine = f32[8,768]{1,0:T(8,128)} dynamic-slice(%reduced, %zero, %zero), dynamic_slice_sizes={8,768}
}

ENTRY %main (a: bf16[24,785,64], b: bf16[24,785,64], g: f32[64,768]) -> (f32[64,768], /*index=1*/f32[8,768]) {
  %a = bf16[24,785,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[24,785,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %g = f32[64,768]{1,0:T(8,128)} parameter(2)
  %scores = bf16[24,785,785]{2,1,0:T(8,128)(2,1)} fusion(%a, %b), kind=kOutput, calls=%fused_convolution
  %start = (f32[8,768]{1,0}, f32[64,768]{1,0}) all-gather-start(%part), replica_groups=[2,8]<=[16], dimensions={0}
  %done = f32[64,768]{1,0:T(8,128)} all-gather-done(%start)
  %part = f32[8,768]{1,0:T(8,128)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (f32[64,768]{1,0:T(8,128)}, f32[8,768]{1,0:T(8,128)}) tuple(%done, %part)
}
"""


def test_a_tpus_program_is_read():
    counts = hlo.count(TPU)
    # 24 matrix products, written as a convolution whose window meets one matrix at a time.
    assert counts.flops == 2 * 24 * 785 * 785 * 64
    assert {(e.kind, e.group_size, e.num_bytes) for e in counts.exchanges} == {
        ("all-gather", 8, 64 * 768 * 4), ("reduce-scatter", 8, 64 * 768 * 4),
    }  # fmt: skip
    scores = 2 * 24 * 785 * (64 + 785)  # the other operand lies in scratch memory
    assert counts.memory_bytes == scores + 4 * 768 * (64 + 8) + 4 * 768 * (8 + 64)


GPU = """HloModule jit_step, is_scheduled=true

ENTRY %main (x: bf16[96,64], k: bf16[64,32], q: bf16[2,10,3,8]) -> bf16[96,32] {
  %x = bf16[96,64]{1,0} parameter(0)
  %k = bf16[64,32]{1,0} parameter(1)
  %q = bf16[2,10,3,8]{3,2,1,0} parameter(2)
  %seen = (bf16[2,3,10,8]{3,1,2,0}, f32[2,3,10]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "3", "10", "10"]}}}
  %stats = f32[2,3,10]{2,1,0} get-tuple-element(%seen), index=1
  %back = (bf16[2,3,10,8]{3,1,2,0}, bf16[2,3,10,8]{3,1,2,0}, bf16[2,3,10,8]{3,1,2,0}, u8[4096]{0}) custom-call(%q, %q, %q, %stats, %q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "3", "10", "10"]}}}
  %other = s8[64]{0} custom-call(%x), custom_call_target="a_kernel"
  %product = (bf16[96,32]{1,0}, s8[33554432]{0}) custom-call(%x, %k), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  ROOT %out = bf16[96,32]{1,0} get-tuple-element(%product), index=0
}
"""  # noqa: E501


def test_what_a_gpus_program_leaves_to_libraries_is_counted():
    counts = hlo.count(GPU)
    scores = 2 * 3 * 10 * 10 * 8
    assert counts.flops == 2 * 96 * 64 * 32 + 2 * (2 + 5) * scores
    patches, stats = 2 * 10 * 3 * 8 * 2, 2 * 3 * 10 * 4
    attention = (3 + 1) * patches + stats + (5 + 3) * patches + stats
    product = 2 * (96 * 64 + 64 * 32 + 96 * 32)  # without the workspace that cuBLAS may use
    assert counts.memory_bytes == attention + product + 2 * 96 * 64 + 64


IN_PLACE = """HloModule m

%two (p0: f32[100,1000], p1: f32[100,1000], r: f32[1,1000]) -> (f32[100,1000], f32[100,1000]) {
  %p0 = f32[100,1000]{1,0} parameter(0)
  %p1 = f32[100,1000]{1,0} parameter(1)
  %r = f32[1,1000]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %one = f32[100,1000]{1,0} dynamic-update-slice(%p0, %r, %zero, %zero)
  %other = f32[100,1000]{1,0} dynamic-update-slice(%p1, %r, %zero, %zero)
  ROOT %both = (f32[100,1000]{1,0}, f32[100,1000]{1,0}) tuple(%one, %other)
}

%part (x: f32[100,1000]) -> f32[10,1000] {
  %x = f32[100,1000]{1,0} parameter(0)
  %s = f32[10,1000]{1,0} slice(%x), slice={[0:10], [0:1000]}
  ROOT %n = f32[10,1000]{1,0} negate(%s)
}

%small (x: f32[100,1000]) -> f32[100,1000] {
  %x = f32[100,1000]{1,0} parameter(0)
  ROOT %n = f32[100,1000]{1,0} negate(%x)
}

%large (x: f32[100,1000]) -> f32[100,1000] {
  %x = f32[100,1000]{1,0} parameter(0)
  %n = f32[100,1000]{1,0} negate(%x)
  ROOT %m = f32[100,1000]{1,0} negate(%n)
}

ENTRY %main (a: f32[100,1000], b: f32[100,1000], r: f32[1,1000], c: pred[]) -> f32[100,1000] {
  %a = f32[100,1000]{1,0} parameter(0)
  %b = f32[100,1000]{1,0} parameter(1)
  %r = f32[1,1000]{1,0} parameter(2)
  %c = pred[] parameter(3)
BODY
}
"""


@pytest.mark.parametrize(
    ("body", "num_bytes"),
    [
        ("ROOT %f = (f32[100,1000]{1,0}, f32[100,1000]{1,0}) fusion(%a, %b, %r), kind=kLoop, calls=%two", 3 * 4000),
        (
            "%s = (f32[100,1000]{1,0:S(1)}, f32[100,1000]{1,0}, u32[]{:S(2)}) copy-start(%a)\n"
            "ROOT %d = f32[100,1000]{1,0:S(1)} copy-done(%s)",
            400_000,
        ),
        ("ROOT %s = f32[10,1000]{1,0} slice(%a), slice={[0:10], [0:1000]}", 2 * 40_000),
        ("ROOT %f = f32[10,1000]{1,0} fusion(%a), kind=kLoop, calls=%part", 2 * 40_000),
        (
            "%s = ((f32[100,1000]{1,0}), f32[10,1000]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:10], [0:1000]}\n"
            "ROOT %d = f32[10,1000]{1,0:S(1)} slice-done(%s)",
            40_000,
        ),
        (
            "ROOT %i = f32[100,1000]{1,0} conditional(%c, %a, %b), true_computation=%small, false_computation=%large",
            4 * 400_000,
        ),
    ],
    ids=[
        "updates in place", "a copy to scratch memory", "a slice", "a fusion that slices", "a slice to scratch memory",
        "the dearest case",
    ],
)
def test_memory_traffic_of(body, num_bytes):
    assert hlo.count(IN_PLACE.replace("BODY", body)).memory_bytes == num_bytes


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no HLO module"):
        hlo.count("module @jit_f {}")


def test_sizes_of_element_types():
    sizes = [hlo_text.Shape(dtype, (3,)).num_bytes for dtype in ("f32", "bf16", "pred", "s4", "f8e4m3fn", "u64", "token")]
    assert sizes == [12, 6, 3, 2, 3, 24, 0]


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,8]<=[16]", 8),
        ("[2,8]<=[4,4]T(1,0)", 8),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0','axis_1'}", 16),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_1'}", 2),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0':(2)4}", 4),
    ],
)
def test_groups_of_devices(groups, size):
    line = f"  ROOT %r = f32[5]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add"
    text = f"ENTRY %main (x: f32[5]) -> f32[5] {{\n  %x = f32[5]{{0}} parameter(0)\n{line}\n}}"
    assert [e.group_size for e in hlo.count(text).exchanges] == [size]
