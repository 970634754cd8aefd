#!/usr/bin/env bash
# Speed of bfloat16 on a CPU that has no instructions for it, beside float32's.
#
# Versions: torch 2.13.0 (CPU), numpy 2.4.6. First seen in 2.15.0, on an AMD EPYC (Zen 3), where a comparison of two
#   trainings, half a minute in float32, did not end in six.
# Good guess: such a processor converts to float32, computes, and converts back: one to two times as long. (Guessed before
#   the first measurement.)
# Behaviour: a 3x3 convolution takes 130 to 190 times as long in contiguous memory and ten times in channels_last, a matrix
#   product 60 times. Nothing warns.
# For users: bf16, advised as the faster precision, stops a training on such a machine. This project says so when a run or
#   a model begins (models/products.py, slow_precision).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
# A newer processor takes the instructions of such a one, too.
export ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 OMP_NUM_THREADS=1
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

print("torch", torch.__version__, "bf16 instructions:", torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.inference_mode()
def seconds(function: Callable[[], object]) -> float:
    """Least processor time of three calls, after one."""
    taken = []
    for _ in range(4):
        start = time.process_time()
        function()
        taken.append(time.process_time() - start)
    return min(taken[1:])


ratios = {}
x, weight = torch.randn(1, 128, 64, 64), torch.randn(128, 128, 3, 3)
for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
    pair = [t.contiguous(memory_format=layout) for t in (x, weight)]
    usual = seconds(partial(F.conv2d, *pair, padding=1))
    half = seconds(partial(F.conv2d, *(t.bfloat16() for t in pair), padding=1))
    ratios[f"3x3 convolution of 128 channels, {name}"] = half / usual
a, b = torch.randn(1024, 1024), torch.randn(1024, 1024).bfloat16()
ratios["matrix product of 1024"] = seconds(partial(torch.mm, b, b)) / seconds(partial(torch.mm, a, a))
for name, ratio in ratios.items():
    print(f"{name}: {ratio:.1f} times as long as in float32")
slow = list(ratios.values())
sys.exit(0 if slow[0] > 20 and slow[1] > 3 and slow[2] > 10 else "the behaviour has changed")
PYTHON
# Output seen (2026-12-02, Python 3.11, AMD EPYC, Zen 3):
#   torch 2.13.0+cpu bf16 instructions: False
#   3x3 convolution of 128 channels, contiguous: 126.6 times as long as in float32
#   3x3 convolution of 128 channels, channels_last: 9.9 times as long as in float32
#   matrix product of 1024: 61.0 times as long as in float32
