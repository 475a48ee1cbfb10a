"""A frozen backbone: CLASSP trains the head of a network that learned elsewhere."""

import jax
import numpy as np
import optax
from digits import Task, accuracy, batches, init_network, permuted_digits, step

import classp_jax


def only(task, classes):
    train, test = np.isin(task.y_train, classes), np.isin(task.y_test, classes)
    return Task(
        task.x_train[train], task.y_train[train], task.x_test[test], task.y_test[test]
    )


# A network that reads 0 to 6, trained with Adam.
(digits,) = permuted_digits(1)
pretrained = init_network()
adam = optax.adam(1e-3)
state = adam.init(pretrained)
for x, y in batches(only(digits, range(7)), passes=5):
    pretrained, state = step(adam, pretrained, state, x, y)

# Its head learns all ten digits. The frozen layers have no state at all, and XLA leaves
# out their backward pass, as nothing uses it.
optimizer = optax.partition(
    {"frozen": optax.set_to_zero(), "trained": classp_jax.classp(0.1, eps=0.01)},
    {"first": "frozen", "second": "frozen", "head": "trained"},
)
params, state = pretrained, optimizer.init(pretrained)
for x, y in batches(digits, passes=5):
    params, state = step(optimizer, params, state, x, y)

for layer in ("first", "second", "head"):
    same = jax.tree.map(np.array_equal, params[layer], pretrained[layer])
    print(f"{layer}: {'unchanged' if all(same.values()) else 'trained'}")
# Only the head has accumulators.
leaves = jax.tree_util.tree_leaves_with_path(classp_jax.accumulators(state))
names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
print("accumulators:", *names)
before, after = accuracy(pretrained, digits), accuracy(params, digits)
print(f"all ten digits: {before:.1%} before, {after:.1%} after")
