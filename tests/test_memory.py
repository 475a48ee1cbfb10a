"""Memory traffic and memory of the compiled step, as XLA counts them; no clock."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import classp_jax

STATIC_POWERS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
BYTES_PER_PARAMETER = 28
# Room for scalars: counts, the learning rate, what XLA keeps for a call.
SCALARS = 4096


def shapes(size: int) -> dict[str, Any]:
    """Parameters as abstract arrays: nothing here is allocated or run.

    Two of them are alike, as the layers of a network are: XLA may share what both need.
    """
    rows = {"a": 4, "b": 2, "c": 1, "d": 1}
    return {
        name: jax.ShapeDtypeStruct((n, size // 8), jnp.float32)
        for name, n in rows.items()
    }


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def compiled_step(tx: optax.GradientTransformation, params: Any) -> Any:
    """The jitted step of a training loop, with parameters and state donated."""

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    step = jax.jit(step, donate_argnums=(0, 1))
    return step.lower(params, state, params).compile()


def check_limits(
    tx: optax.GradientTransformation, limit: int = BYTES_PER_PARAMETER
) -> None:
    params = shapes(1 << 20)
    step = compiled_step(tx, params)
    per_parameter = step.cost_analysis()["bytes accessed"] / count(params)
    assert per_parameter <= limit + 0.01
    memory = step.memory_analysis()
    assert memory.temp_size_in_bytes <= SCALARS
    # Parameters and accumulator are written where they were read.
    assert memory.alias_size_in_bytes >= 2 * 4 * count(params)


@pytest.mark.parametrize(
    ("power", "threshold"),
    [*((power, 1e-6) for power in STATIC_POWERS), (0.5, 0.0), (1.0, 0.0), (2.0, 0.0)],
)
def test_classp_stays_within_the_limits(power: float, threshold: float):
    check_limits(classp_jax.classp(0.1, threshold, power))


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_windows_priors_and_brakes_take_no_more(power: float):
    check_limits(classp_jax.classp(0.1, 1e-6, power, window=100.0))
    check_limits(classp_jax.classp(0.1, 0.0, power, prior=3.0, window=lambda t: t + 9))
    check_limits(classp_jax.protect(optax.sgd(0.1), power, window=100.0))
    check_limits(classp_jax.protect(optax.sgd(0.1), power, frozen=lambda t: t > 9))


@pytest.mark.parametrize("unit", ["leaf", "tree"])
def test_a_unit_of_epsilon_reads_the_gradient_once_more_on_a_cpu(unit: str):
    """XLA makes no kernel with two outputs there; elsewhere the mean is free."""
    check_limits(classp_jax.classp(0.1, 1e-6, eps_unit=unit), 32)
    # Here the accumulator needs the squares, too.
    check_limits(classp_jax.classp(0.1, 0.0, 2.0, eps_unit=unit), 32)
    check_limits(classp_jax.protect(optax.sgd(0.1), eps_unit=unit), 32)


def test_everything_in_bfloat16_takes_half_the_bytes():
    tx = classp_jax.classp(0.1, accumulator_dtype=jnp.bfloat16)
    params = jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(w.shape, jnp.bfloat16), shapes(1 << 20)
    )
    step = compiled_step(tx, params)
    assert step.cost_analysis()["bytes accessed"] / count(params) <= 14.01
    assert step.memory_analysis().temp_size_in_bytes <= SCALARS


def test_classp_with_schedules_stays_within_the_limits():
    check_limits(
        classp_jax.classp(
            optax.linear_schedule(0.1, 0.0, 100),
            optax.linear_schedule(0.0, 1e-3, 100),
            scaling=lambda step: step > 10,
        )
    )


def test_injected_classp_stays_within_the_limits():
    # A traced power takes the general form; it costs time, not memory.
    hyperparams = {"learning_rate": 0.1, "threshold": 1e-6, "power": 1.0, "eps": 0.1}
    scaling = jnp.asarray(True)
    check_limits(
        optax.inject_hyperparams(classp_jax.classp)(**hyperparams, scaling=scaling)
    )


def test_the_limit_tells_a_chain_of_mask_and_scale():
    # The reason for classp being one expression a leaf. If this fails because the
    # chain got as cheap, classp can become the chain.
    chain = optax.chain(
        classp_jax.mask_by_threshold(1e-6),
        classp_jax.scale_by_generalized_adagrad(),
        optax.scale_by_learning_rate(0.1),
    )
    with pytest.raises(AssertionError):
        check_limits(chain)


@pytest.mark.parametrize("power", [*STATIC_POWERS, 1.7])
def test_the_state_is_one_array_the_size_of_the_parameters(power: float):
    params = shapes(1 << 20)
    state: Any = jax.eval_shape(classp_jax.classp(0.1, 1e-6, power).init, params)
    assert count(state.accumulator) == count(params)
    leaves = jax.tree.leaves(state.accumulator)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    # The step count, and a number for each leaf.
    assert count(state) - count(params) == 1 + len(leaves)


def test_the_masks_keep_scalars_only():
    params = shapes(1 << 20)
    for tx, scalars in (
        (classp_jax.mask_by_threshold(1e-6), 1),
        (classp_jax.mask_to_density(0.1), 1 + len(params)),
    ):
        state = jax.tree.leaves(jax.eval_shape(tx.init, params))
        assert [leaf.ndim for leaf in state] == [0] * scalars


@pytest.mark.parametrize("per_leaf", [True, False])
@pytest.mark.parametrize("shape", [(1 << 20,), (1 << 10, 1 << 10)])
def test_a_mask_to_density_reads_the_gradients_twice_and_stores_a_byte(shape, per_leaf):
    """Alone, on a CPU: 4 bytes for the size; 8 to mask; 4 + 1 + 1 to count, bytewise.

    Other compilers count while they mask.
    """
    tx: Any = classp_jax.mask_to_density(0.1, per_leaf=per_leaf)
    g = jax.ShapeDtypeStruct(shape, jnp.float32)
    compiled: Any = (
        jax.jit(tx.update, donate_argnums=1)
        .lower([g, g], jax.eval_shape(tx.init, [g, g]))
        .compile()
    )
    assert compiled.cost_analysis()["bytes accessed"] / 2 / g.size <= 18.01
    assert compiled.memory_analysis().temp_size_in_bytes / 2 / g.size <= 1.01
