"""The benchmark of kernels assigns a trace's events to the right parts of the model."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import kernels

PROGRAM = """HloModule jit_train_step, is_scheduled=true

%fused (x: bf16[96,32]) -> bf16[96,32] {
  %x = bf16[96,32]{1,0} parameter(0)
  ROOT %n = bf16[96,32]{1,0} negate(%x)
}

ENTRY %main (x: bf16[96,64], k: bf16[64,32]) -> bf16[96,32] {
  %x = bf16[96,64]{1,0} parameter(0)
  %k = bf16[64,32]{1,0} parameter(1)
  %cublas-gemm.1 = (bf16[96,32]{1,0}, s8[64]{0}) custom-call(%x, %k), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %y = bf16[96,32]{1,0} get-tuple-element(%cublas-gemm.1), index=0
  %loop_negate_fusion.3 = bf16[96,32]{1,0} fusion(%y), kind=kLoop, calls=%fused, metadata={op_name="jit(train_step)/transpose(jvp(MC3))/video/encoder/SpaceTimeBlock/mlp/hidden/neg"}
  ROOT %loop_negate_fusion.4 = bf16[96,32]{1,0} fusion(%loop_negate_fusion.3), kind=kLoop, calls=%fused, metadata={op_name="jit(train_step)/neg"}
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("op_name", "part"),
    [
        ("jit(train_step)/jvp(MC3)/video/encoder/SpaceTimeBlock/time_attention/reduce_sum", "video time_attention"),
        ("jit(train_step)/jvp(MC3)/audio/encoder/block_11/PreNormBlock/mlp/hidden/add", "audio mlp hidden"),
        ("jit(train_step)/transpose(jvp(MC3))/video/encoder/checkpoint/SpaceTimeBlock/mlp/mul", "video mlp, back"),
        (
            "jit(train_step)/transpose(jvp(MC3))/video/encoder/checkpoint/rematted_computation/SpaceTimeBlock/mlp/mul",
            "video mlp, again",
        ),
        ("jit(train_step)/cond/branch_0_fun/mul", kernels.REST),
        ("jit(train_step)/transpose(jvp(MC3))/text/encoder/while/body/attention/mul", "text attention, back"),
        ("jit(train_step)/jit(_where)/select_n", kernels.REST),
    ],
)
def test_an_operation_belongs_to_a_part_of_the_model(op_name, part):
    assert kernels.part_of(op_name) == part


def test_gpu_kernels_are_found_in_the_program_by_their_names():
    events = [
        ("loop_negate_fusion_3", 0.5), ("loop_negate_fusion_3", 0.5), ("loop_negate_fusion_4", 0.25),
        ("nvjet_sm90_tst_128x160", 2.0), ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", 1.5), ("MemcpyD2D", 0.1),
        ("unheard_of", 0.01),
    ]  # fmt: skip
    passes = 2 * 2 * 96 * 32
    assert list(kernels.sort_events(iter(events), PROGRAM).items()) == [
        (kernels.PRODUCTS, [2.0, 1, 0]), (kernels.ATTENTION, [1.5, 1, 0]), ("video mlp hidden, back", [1.0, 2, 2 * passes]),
        (kernels.REST, [0.25, 1, passes]), (kernels.COPIES, [0.1, 1, 0]),
        ("not in the program", [0.01, 1, 0]),
    ]  # fmt: skip


def test_a_trace_of_this_machine_is_read_and_a_loop_counts_by_its_body(tmp_path):
    step = jax.jit(lambda x: jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, length=5)[0])
    x = jnp.ones((256, 256))
    step(x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(3):
            step(x).block_until_ready()
    parts = kernels.sort_events(kernels.find_events(str(tmp_path)), step.lower(x).compile().as_text())
    milliseconds, launches, num_bytes = parts[kernels.XLA_PRODUCTS]
    assert launches == 3 * 5
    assert milliseconds > 0
    assert 1 <= num_bytes / (3 * 5 * 2 * 4 * 256**2) < 2  # a matrix is read and written
    assert "not in the program" not in parts
