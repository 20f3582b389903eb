"""A FractalNet trained by a loop of your own, without `python -m fractalnet`: what a step is, and what comes out.

    python examples/by_hand.py

Every call in training draws a drop-path path, and only what lives under it runs. Afterwards the columns answer alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fractalnet import FractalNet
from sklearn.datasets import load_digits


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    split = len(images) * 4 // 5
    net = FractalNet(10, columns=3, channels=(16, 32), in_channels=1, image_size=8, local_drop=0.15, global_ratio=0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    for epoch in range(15):
        total = 0.0
        for batch in torch.randperm(split).split(50):
            loss = F.cross_entropy(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        print(f"epoch {epoch + 1}: loss {total / split:.3f}")

    net.eval()
    with torch.no_grad():
        full = net(images[split:]).argmax(1) == labels[split:]
        print(f"full network: {full.float().mean():.1%} of the held-out digits")
        for column, depth, logits in net.anytime(images[split:]):
            right = logits.argmax(1) == labels[split:]
            print(f"column {column} alone, {depth} layers: {right.float().mean():.1%}")


if __name__ == "__main__":
    main()
