"""JAX: one step is one jitted call, with optax's Adam; parameters and state are donated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.frameworks.shapes import HEADS, LAYERS, MODELS, Order

Params = dict[str, Any]


def _linear(params: Params, name: str, x: Any) -> Any:
    return x @ params[f"{name}.w"] + params[f"{name}.b"]


def _softmax(params: Params, x: Any) -> Any:
    return _linear(params, "0", x)


def _mlp(params: Params, x: Any) -> Any:
    x = jax.nn.relu(_linear(params, "0", x))
    return _linear(params, "2", jax.nn.relu(_linear(params, "1", x)))


def _cnn(params: Params, x: Any) -> Any:
    for name in ("0", "1"):
        x = jax.lax.conv_general_dilated(
            x, params[f"{name}.w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + params[f"{name}.b"])
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = jax.nn.relu(_linear(params, "2", x.reshape(len(x), -1)))
    return _linear(params, "3", x)


def _norm(params: Params, name: str, x: Any) -> Any:
    mean = x.mean(-1, keepdims=True)
    spread = jax.lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5)
    return (x - mean) * spread * params[f"{name}.scale"] + params[f"{name}.b"]


def _transformer(params: Params, tokens: Any) -> Any:
    x = params["embed"][tokens]
    n, length, width = x.shape
    for layer in range(LAYERS):
        qkv = _linear(params, f"{layer}.qkv", x).reshape(n, length, 3, HEADS, width // HEADS)
        mixed = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        attended = _linear(params, f"{layer}.proj", mixed.reshape(n, length, width))
        x = _norm(params, f"{layer}.first", x + attended)
        hidden = jax.nn.relu(_linear(params, f"{layer}.up", x))
        x = _norm(params, f"{layer}.second", x + _linear(params, f"{layer}.down", hidden))
    return _linear(params, "out", x.mean(1))


def _embedding(params: Params, rows: Any) -> Any:
    x = params["table"][rows].reshape(len(rows), -1)
    return _linear(params, "1", jax.nn.relu(_linear(params, "0", x)))


FORWARD: dict[str, Callable[[Params, Any], Any]] = {
    "softmax": _softmax, "mlp": _mlp, "cnn": _cnn, "transformer": _transformer,
    "embedding": _embedding,
}  # fmt: skip


def make(name: str) -> tuple[Callable[[], None], Callable[[], float], int]:
    """A call that makes steps, one that waits for them and gives the last loss, and the number of
    samples that a call of the first uses."""
    model, forward = MODELS[name], FORWARD[name]
    optimizer = optax.adam(1e-3)
    inputs, labels = map(jnp.asarray, model.data())

    def loss(params: Params, x: Any, y: Any) -> Any:
        scores = forward(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

    def step(params: Params, state: Any, rows: Any, inputs: Any, labels: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, inputs[rows], labels[rows])
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    compiled = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.asarray, model.start())
    now = [params, optimizer.init(params), jnp.zeros(())]
    order = Order(model.batch)

    def run() -> None:
        now[:] = compiled(now[0], now[1], order(), inputs, labels)

    def finish() -> float:
        jax.block_until_ready(now)
        return float(now[2])

    return run, finish, model.batch
