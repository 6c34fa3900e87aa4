"""TensorFlow: one call of a `tf.function` makes many steps, with Keras's Adam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.frameworks.shapes import HEADS, LAYERS, MODELS, Order

STEPS = 20
"""In one call."""

Params = dict[str, Any]


def _linear(params: Params, name: str, x: Any) -> Any:
    return tf.matmul(x, params[f"{name}.w"]) + params[f"{name}.b"]


def _softmax(params: Params, x: Any) -> Any:
    return _linear(params, "0", x)


def _mlp(params: Params, x: Any) -> Any:
    x = tf.nn.relu(_linear(params, "0", x))
    return _linear(params, "2", tf.nn.relu(_linear(params, "1", x)))


def _cnn(params: Params, x: Any) -> Any:
    for name in ("0", "1"):
        x = tf.nn.conv2d(x, params[f"{name}.w"], 1, "SAME")
        x = tf.nn.max_pool2d(tf.nn.relu(tf.nn.bias_add(x, params[f"{name}.b"])), 2, 2, "VALID")
    x = tf.nn.relu(_linear(params, "2", tf.reshape(x, (-1, 32 * 7 * 7))))
    return _linear(params, "3", x)


def _norm(params: Params, name: str, x: Any) -> Any:
    mean, variance = tf.nn.moments(x, -1, keepdims=True)
    return tf.nn.batch_normalization(
        x, mean, variance, params[f"{name}.b"], params[f"{name}.scale"], 1e-5
    )


def _transformer(params: Params, tokens: Any) -> Any:
    x = tf.gather(params["embed"], tokens)
    n, length, width = x.shape
    for layer in range(LAYERS):
        qkv = _linear(params, f"{layer}.qkv", tf.reshape(x, (n * length, width)))
        qkv = tf.transpose(tf.reshape(qkv, (n, length, 3, HEADS, width // HEADS)), (2, 0, 3, 1, 4))
        scores = tf.matmul(qkv[0], qkv[1], transpose_b=True) * (width // HEADS) ** -0.5
        mixed = tf.transpose(tf.matmul(tf.nn.softmax(scores), qkv[2]), (0, 2, 1, 3))
        attended = _linear(params, f"{layer}.proj", tf.reshape(mixed, (n * length, width)))
        x = _norm(params, f"{layer}.first", tf.reshape(x, (n * length, width)) + attended)
        hidden = tf.nn.relu(_linear(params, f"{layer}.up", x))
        x = _norm(params, f"{layer}.second", x + _linear(params, f"{layer}.down", hidden))
        x = tf.reshape(x, (n, length, width))
    return _linear(params, "out", tf.reduce_mean(x, 1))


def _embedding(params: Params, rows: Any) -> Any:
    x = tf.reshape(tf.gather(params["table"], rows), (-1, 8 * 32))
    return _linear(params, "1", tf.nn.relu(_linear(params, "0", x)))


FORWARD: dict[str, Callable[[Params, Any], Any]] = {
    "softmax": _softmax, "mlp": _mlp, "cnn": _cnn, "transformer": _transformer,
    "embedding": _embedding,
}  # fmt: skip


def make(name: str) -> tuple[Callable[[], None], Callable[[], float], int]:
    """A call that makes steps, one that waits for them and gives the last loss, and the number of
    samples that a call of the first uses."""
    model, forward = MODELS[name], FORWARD[name]
    params = {name: tf.Variable(value) for name, value in model.start().items()}
    optimizer = tf.keras.optimizers.Adam(1e-3)
    optimizer.build(list(params.values()))
    inputs, labels = map(tf.constant, model.data())
    last = tf.Variable(0.0)

    @tf.function
    def steps(rows: Any) -> None:
        for number in tf.range(STEPS):
            x, y = tf.gather(inputs, rows[number]), tf.gather(labels, rows[number])
            with tf.GradientTape() as tape:
                scores = forward(params, tf.ensure_shape(x, (model.batch, *model.sample)))
                loss = tf.reduce_mean(
                    tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=scores)
                )
            grads = tape.gradient(loss, list(params.values()))
            optimizer.apply_gradients(zip(grads, params.values(), strict=True))
            last.assign(loss)

    order = Order(model.batch)

    def run() -> None:
        steps(tf.constant(np.stack([order() for _ in range(STEPS)])))

    return run, lambda: float(last.numpy()), STEPS * model.batch
