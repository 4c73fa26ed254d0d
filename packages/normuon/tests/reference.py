"""NorMuon one matrix at a time, written from algorithm 1 alone; nothing here is fast, batched or distributed."""

import math

import torch

JORDAN = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def scalar_map(s, method):
    """What five steps do to a singular value s of U / ||U||_F."""
    s = s / 1.02 if method == "polar_express" else s
    for a, b, c in POLAR_EXPRESS if method == "polar_express" else JORDAN:
        s = a * s + b * s**3 + c * s**5
    return s


def orthogonalize(u, method):
    if method == "svd":
        left, _, right = torch.linalg.svd(u, full_matrices=False)
        return left @ right if u.any() else torch.zeros_like(u)
    safety, eps = (1.02, 1e-6) if method == "polar_express" else (1.0, 1e-7)
    x = u / (safety * u.norm() + eps)
    for a, b, c in POLAR_EXPRESS if method == "polar_express" else JORDAN:
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x


def step(w, g, m, v, *, lr, beta1=0.95, beta2=0.95, decay=0.1, nesterov=True, eps=1e-8, scale="rms", axis="row",
         method="polar_express", cautious=False):  # fmt: skip
    """One step on one matrix. `v` is a column (axis "row") or a row; None is Muon. Returns new w, m, v."""
    rows, columns = w.shape
    m = beta1 * m + (1 - beta1) * g
    o = orthogonalize((1 - beta1) * g + beta1 * m if nesterov else m, method)
    hat = o
    if v is not None:
        dim = 1 if axis == "row" else 0
        v = beta2 * v + (1 - beta2) * (o * o).mean(dim, keepdim=True)
        hat = torch.where(v > 0, o / (v.sqrt() + eps), torch.zeros_like(o))
    if not hat.any():
        update = torch.zeros_like(w)
    elif scale == "rms":
        update = hat * 0.2 * math.sqrt(rows * columns) / hat.norm()
    else:
        factor = {
            "original": math.sqrt(max(1, rows / columns)),
            "spectral": math.sqrt(rows / columns),
            "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
            None: 1.0,
        }[scale]
        update = hat * (o.norm() / hat.norm()) * factor
    kept = torch.where(update * w > 0, w * (1 - lr * decay), w) if cautious else w * (1 - lr * decay)
    return kept - lr * update, m, v
