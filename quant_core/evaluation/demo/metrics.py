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


def ssim(reference: torch.Tensor, test: torch.Tensor) -> float:
    """Structural similarity of pictures (B, H, W, 3) in [0, 1], 1 where they are the same; the mean over
    windows, colours and pictures.

    Wang, Bovik, Sheikh and Simoncelli, Image quality assessment, IEEE Transactions on Image Processing 13
    (2004), with their Gaussian window of 11 pixels and constants. Smaller pictures get a smaller window.
    """
    size = min(11, reference.shape[1], reference.shape[2])
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    window = torch.exp(-axis.square() / (2 * 1.5**2))
    window = window / window.sum()

    def mean(x):
        x = torch.nn.functional.conv2d(x, window.view(1, 1, -1, 1))
        return torch.nn.functional.conv2d(x, window.view(1, 1, 1, -1))

    a, b = (x.double().cpu().movedim(-1, 1).reshape(-1, 1, *x.shape[1:3]) for x in (reference, test))
    means = mean(a), mean(b)
    varies = mean(a * a) - means[0] ** 2, mean(b * b) - means[1] ** 2
    together = mean(a * b) - means[0] * means[1]
    c1, c2 = 0.01**2, 0.03**2
    light = (2 * means[0] * means[1] + c1) / (means[0] ** 2 + means[1] ** 2 + c1)
    return float((light * (2 * together + c2) / (varies[0] + varies[1] + c2)).mean())
