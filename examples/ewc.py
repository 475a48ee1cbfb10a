"""EWC on top of CLASSP: a penalty in front of the optimizer."""

import optax
from digits import accuracy, batches, init_network, logits, permuted_digits, step

import classp_jax
from classp_jax import regularizers

tasks = permuted_digits(3)


def train(optimizer):
    params = init_network()
    state = optimizer.init(params)
    for task in tasks:
        for x, y in batches(task, passes=5):
            params, state = step(optimizer, params, state, x, y)
        # Unlike CLASSP, EWC has to be told when a task ends and what mattered in it.
        if regularizers.needs_fisher(state):
            fisher = regularizers.fisher_diagonal(logits, params, task.x_train[:500])
            state = regularizers.consolidate(state, params, fisher)
    return params


classp = classp_jax.classp(learning_rate=0.1, eps=0.1)
ewc_and_classp = optax.chain(regularizers.ewc(strength=100.0), classp)

print("test accuracy on tasks 1, 2 and 3, after all three:")
for name, optimizer in (("CLASSP", classp), ("EWC and CLASSP", ewc_and_classp)):
    params = train(optimizer)
    print(f"{name}:", *(f"{accuracy(params, task):.1%}" for task in tasks))
