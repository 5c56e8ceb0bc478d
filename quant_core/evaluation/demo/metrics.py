"""How far a quantized model's pictures are from the reference's."""

import torch


def psnr_db(reference: torch.Tensor, test: torch.Tensor, peak: float) -> float:
    """10 log10(peak^2 / MSE)."""
    mse = (reference.double() - test.double()).square().mean().clamp(min=1e-20)
    return float(10 * torch.log10(peak**2 / mse))


def latent_psnr_db(reference, test) -> float:
    """Peak: the range of the reference latents."""
    return psnr_db(reference, test, float(reference.max() - reference.min()))


def high_frequency_ratio(reference, test) -> float:
    """Energy above half the Nyquist frequency in pictures (B, H, W, 3), test over reference. Below 1: blur;
    above: noise."""

    def energy(pictures):
        spectrum = torch.fft.fft2(pictures.double(), dim=(1, 2)).abs().square()
        frequency = torch.fft.fftfreq(pictures.shape[1], dtype=torch.float64).abs()
        high = torch.maximum(frequency[:, None], frequency[None]) > 0.25
        return spectrum[:, high].sum()

    return float(energy(test) / energy(reference))
