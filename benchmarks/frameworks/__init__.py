"""The benchmark's models in other frameworks, which run in an environment of their own.

    .venv-frameworks/bin/python -m benchmarks.frameworks jax mlp --seconds 2

Neither torch nor Lockstep is imported here. Each framework does what its own guides tell for
speed: one process, all cores, the whole step compiled, buffers given back or kept in place.

shapes           the models' parameters and data, as NumPy arrays
jax_steps        JAX: `jit` of a step, with optax's Adam and donated buffers
tensorflow_steps TensorFlow: a `tf.function` of many steps
"""
