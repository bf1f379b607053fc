"""What is learnt: three networks, each an `nn.Module` by itself, and the model they make up."""

from crossmr.networks.c_unet import CUNet, SynthesisConfig
from crossmr.networks.distribution import DistributionConfig, DistributionNetwork
from crossmr.networks.masked_autoencoder import MaskedAutoencoder, RepresentationConfig

__all__ = [
    "CUNet",
    "DistributionConfig",
    "DistributionNetwork",
    "MaskedAutoencoder",
    "RepresentationConfig",
    "SynthesisConfig",
]
