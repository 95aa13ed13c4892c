"""The presets of compressed-tensors whose number formats calipers knows."""

from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES as ALL

#: compressed-tensors 0.20 brings fp6, which calipers refuses by name.
PRESETS = {name: preset for name, preset in ALL.items() if not name.startswith("MXFP6")}
