"""Makes s4d.safetensors: diagonal state spaces with random A, B, C, D, sampled and run by scipy.signal (1.17.1).

Run as ``python make_s4d.py`` where numpy, scipy and safetensors are installed. A complex number becomes a real 2 x 2
block, so that scipy sees an ordinary real system: x' = A x + B u, y = C x + D u.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from scipy.signal import cont2discrete, dlsim

CHANNELS, STATES, TOKENS = 3, 4, 75

rng = np.random.default_rng(0)
a = -rng.uniform(0.05, 1.5, (CHANNELS, STATES)) + 1j * rng.normal(0, 4, (CHANNELS, STATES))
b, c = (rng.normal(size=(CHANNELS, STATES)) + 1j * rng.normal(size=(CHANNELS, STATES)) for _ in range(2))
d, dt = rng.normal(size=CHANNELS), rng.uniform(0.01, 0.5, CHANNELS)
u = rng.normal(size=(TOKENS, CHANNELS))
y = np.empty_like(u)
for i in range(CHANNELS):
    big = np.zeros((2 * STATES, 2 * STATES))
    for n in range(STATES):
        z = a[i, n]
        big[2 * n : 2 * n + 2, 2 * n : 2 * n + 2] = [[z.real, -z.imag], [z.imag, z.real]]
    into = np.stack([b[i].real, b[i].imag], 1).reshape(-1, 1)
    out = 2 * np.stack([c[i].real, -c[i].imag], 1).reshape(1, -1)
    A, B, C, D, step = cont2discrete((big, into, out, [[d[i]]]), dt[i], method="zoh")
    # dlsim puts out C x_t + D u_t before the step; a layer reads u_t first: y_t = C x_{t+1} + D u_t
    y[:, i] = dlsim((A, B, C @ A, C @ B + D, step), u[:, i])[1][:, 0]
pairs = {name: np.stack([v.real, v.imag], -1) for name, v in {"a": a, "b": b, "c": c}.items()}
save_file(pairs | {"d": d, "dt": dt, "u": u, "y": y}, Path(__file__).parent / "s4d.safetensors")
