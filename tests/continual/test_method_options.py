"""Learning without forgetting, the labels trick and softened Fisher information."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from classp_jax import continual
from classp_jax.continual.methods import Problem, method
from classp_jax.continual.train.plan import Training
from classp_jax.continual.train.step import make_problem

pytestmark = pytest.mark.usefixtures("quick_compilation")

CLASSES = 4


def _problem(tasks: Any) -> Problem:
    """A linear network, as training makes its problems."""
    from classp_jax.continual.train.step import RunData

    example = jax.ShapeDtypeStruct((3,), jnp.float32)
    model = continual.as_model(
        (lambda key: jax.random.normal(key, (3, CLASSES)), lambda w, x: x @ w),
        example,
        CLASSES,
    )
    sizes = jnp.full(len(tasks), 16, jnp.int32)
    run = RunData(0.0, 1.0, None, jnp.asarray(tasks), sizes, sizes // 8)
    return make_problem(model, run, example, Training(batch_size=8), True)


def _batch(seed: int, labels: Any, classes: Any = True) -> Any:
    rng = np.random.default_rng(seed)
    return continual.Batch(
        jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
        jnp.asarray(rng.choice(labels, 8), jnp.int32),
        jnp.zeros(8, jnp.int32),
        jnp.broadcast_to(jnp.asarray(classes), (8, CLASSES)),
        jnp.ones(8),
    )


def _stepped(name: str, problem: Any, settings: Any) -> Any:
    found = method(name)
    full = {n: s.default for n, s in found.settings.items()} | settings
    made = found.make(full, problem)
    # One by one, their operations take longer to compile.
    return made._replace(
        init=jax.jit(made.init),
        step=jax.jit(made.step),
        end_of_task=made.end_of_task and jax.jit(made.end_of_task),
    )


def _torch_gradient(w: np.ndarray, loss: Any) -> np.ndarray:
    weight = torch.tensor(w, dtype=torch.float64, requires_grad=True)
    loss(weight).backward()
    assert weight.grad is not None
    return weight.grad.numpy()


def test_lwf_is_taught_by_the_network_of_the_last_end_over_the_classes_seen():
    groups = [[0, 1], [2], [3]]
    problem = _problem(np.ones((3, CLASSES), bool))
    functions = _stepped("lwf", problem, {"learning_rate": 0.5, "strength": 0.7})
    assert functions.end_of_task is not None
    key = jax.random.key(0)
    params: Any = problem.init(key)
    w = np.asarray(params, np.float64)
    state, known = functions.init(params, key), []
    teacher: Any = None
    for task, labels in enumerate(groups):
        for i in range(3):
            batch = _batch(10 * task + i, labels)
            params, state, _ = functions.step(params, state, batch, key)
            x = torch.tensor(np.asarray(batch.x, np.float64))
            y = torch.tensor(np.asarray(batch.y, np.int64))

            def loss(weight, x=x, y=y, teacher=teacher, known=tuple(known)):
                old = list(known)
                new = torch.nn.functional.cross_entropy(x @ weight, y)
                if teacher is None:
                    return new
                soft = torch.softmax((x @ torch.tensor(teacher))[:, old] / 2, 1)
                own = torch.log_softmax((x @ weight)[:, old] / 2, 1)
                return new - 0.7 * 4 * (soft * own).sum(1).mean()

            w = np.asarray(w - 0.5 * _torch_gradient(w, loss))
            np.testing.assert_allclose(params, w, rtol=1e-4, atol=1e-5)
        params, state = functions.end_of_task(params, state, _batch(9, labels), key)
        teacher, known = w.copy(), known + labels


def test_lwf_has_a_softmax_for_each_head_where_the_task_is_known():
    tasks = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool)
    problem = _problem(tasks)
    functions = _stepped("lwf", problem, {"learning_rate": 0.5, "strength": 0.7})
    assert functions.end_of_task is not None
    key = jax.random.key(0)
    params: Any = problem.init(key)
    state = functions.init(params, key)
    first, batch = (_batch(k, [2 * k, 2 * k + 1], tasks[k]) for k in (0, 1))
    params, state, _ = functions.step(params, state, first, key)
    teacher = np.asarray(params, np.float64)
    params, state = functions.end_of_task(params, state, first, key)
    before = teacher + 1.0
    params, state, _ = functions.step(params + 1.0, state, batch, key)
    x = torch.tensor(np.asarray(batch.x, np.float64))
    y = torch.tensor(np.asarray(batch.y, np.int64))

    def loss(weight):
        new = torch.nn.functional.cross_entropy((x @ weight)[:, 2:], y - 2)
        soft = torch.softmax((x @ torch.tensor(teacher))[:, :2] / 2, 1)
        own = torch.log_softmax((x @ weight)[:, :2] / 2, 1)
        return new - 0.7 * 4 * (soft * own).sum(1).mean()

    expected = before - 0.5 * _torch_gradient(before, loss)
    np.testing.assert_allclose(params, expected, rtol=1e-4, atol=1e-5)


def test_the_labels_trick_counts_the_classes_of_the_batch_and_shows_all_logits():
    problem = _problem(np.ones((1, CLASSES), bool))
    key = jax.random.key(0)
    params: Any = problem.init(key)
    batch = _batch(0, [1, 3])
    for name in ("labels-trick", "labels-trick+replay"):
        functions = _stepped(name, problem, {"learning_rate": 1.0})
        state = functions.init(params, key)
        moved, _, metrics = functions.step(params, state, batch, key)
        x, y = batch.x, jnp.asarray(batch.y) // 2

        def loss(w, x=x, y=y):
            shown = (x @ w)[:, [1, 3]]
            errors = optax.softmax_cross_entropy_with_integer_labels(shown, y)
            return jnp.mean(errors)

        expected = params - jax.jit(jax.grad(loss))(params)
        np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(moved[:, [0, 2]], params[:, [0, 2]])
        np.testing.assert_allclose(metrics.logits[:8], x @ params, rtol=1e-5)


def test_the_temperature_softens_the_outputs_that_the_fisher_information_is_of():
    problem = _problem(np.ones((2, CLASSES), bool))
    key = jax.random.key(0)
    params: Any = 20 * problem.init(key)
    sample = _batch(3, [0, 1])
    fishers = {}
    for temperature in (1.0, 10.0):
        settings = {"learning_rate": 0.1, "strength": 1.0, "temperature": temperature}
        functions = _stepped("implicit-ewc", problem, settings)
        assert functions.end_of_task is not None
        state = functions.init(params, key)
        _, state = functions.end_of_task(params, state, sample, key)
        fishers[temperature] = state.additions[0].fisher
        x, w = np.asarray(sample.x, np.float64), np.asarray(params, np.float64)
        logits = x @ w / temperature
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        # Of d log p_c / dw = x (onehot - p) / T, the mean square over c and examples.
        variance = p * (1 - p)
        expected = (x**2).T @ variance / len(x) / temperature**2
        np.testing.assert_allclose(fishers[temperature], expected, rtol=1e-3, atol=1e-9)
