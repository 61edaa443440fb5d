"""What is known about CUDA cards: their peak, and why torch cannot use one."""

import os
import re
import shutil
import subprocess

import torch

# dense matrix TFLOP/s in 16-bit floats with fp32 sums, from NVIDIA's data sheets and white papers, by the
# whole name of a card: any other, a slice of one or its laptop version has no MFU rather than a wrong one
# fmt: off
GEFORCE_RTX = {
    "3060": 25.5, "3060 Ti": 32.4, "3070": 40.6, "3070 Ti": 43.5, "3080": 59.5, "3080 Ti": 68.2, "3090": 71,
    "3090 Ti": 80, "4060": 30.2, "4060 Ti": 44.1, "4070": 58.3, "4070 SUPER": 71, "4070 Ti": 80.2,
    "4070 Ti SUPER": 88.2, "4080": 97.5, "4080 SUPER": 104.5, "4090": 165, "5070": 61.7, "5070 Ti": 87.9,
    "5080": 112.6, "5090": 209.5,
}
PEAK_TFLOPS = {
    r"NVIDIA B200": 2250, r"NVIDIA H200": 989, r"NVIDIA H100( 80GB HBM3| SXM5)?": 989,
    r"NVIDIA H100 PCIe": 756, r"(NVIDIA )?A100-(SXM4|PCIE|PCIe)-(40|80)GB|NVIDIA A100 80GB PCIe": 312,
    r"NVIDIA A10": 125, r"NVIDIA L4": 121, r"NVIDIA L40S": 362, r"(NVIDIA )?RTX A6000": 154.8,
    r"NVIDIA RTX 6000 Ada Generation": 364, r"Tesla T4": 65,
    **{f"NVIDIA GeForce RTX {card}": peak for card, peak in GEFORCE_RTX.items()},
}
# fmt: on


def peak_flops(device, dtype):
    """Return the known peak FLOP/s of the device in this dtype, or None."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    card = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for name, peak in PEAK_TFLOPS.items() if re.fullmatch(name, card)), None)


def fault(number):
    """Return why torch cannot use the CUDA card with this index, and the remedy; '' if it can, if there is
    none, or if CUDA_VISIBLE_DEVICES hides it."""
    build = f"torch {torch.__version__}"
    other = "another build of torch: https://pytorch.org/get-started"
    if torch.cuda.is_available():
        known = [int(arch[3:]) for arch in torch.cuda.get_arch_list() if re.fullmatch(r"sm_\d+", arch)]
        if number >= torch.cuda.device_count():
            return ""
        major, minor = torch.cuda.get_device_capability(number)
        if 10 * major + minor >= min(known, default=0):
            return ""
        card = torch.cuda.get_device_name(number)
        return f"{build} has no code for {card}, compute capability {major}.{minor}; install {other}"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "-L"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20)
    except subprocess.TimeoutExpired:
        return "nvidia-smi does not answer; to use the CPU on purpose: --device=cpu"
    if listed.returncode:
        return f"nvidia-smi fails: {' '.join(listed.stdout.split())[:200]}; to use the CPU: --device=cpu"
    card = listed.stdout.partition("(")[0].strip()  # of GPU 0: NVIDIA GeForce RTX 3060 (UUID: ...)
    if not torch.version.cuda:
        return f"nvidia-smi lists {card}, but {build} is built without CUDA; install {other}"
    needed = f"{build} needs a driver for CUDA {torch.version.cuda}"
    return f"nvidia-smi lists {card}, but {needed}; update the driver, or install {other}"
