"""Generators: layout (and style code) -> images in [-1, 1]; style encoder: image -> its style code's distribution."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade.errors import ConfigError
from imaginaire_spade.layout import LayoutSpec, Noise, SemanticLayout
from imaginaire_spade.models.layers import InstanceNorm2d, enlarge, enlarge_smoothly, instance_norm
from imaginaire_spade.models.modulation import convolve_modulated
from imaginaire_spade.models.noise_injection import BlockNoise, PixelNoise
from imaginaire_spade.models.norms import SPADE, AdaptiveBatchNorm, ConditionalNorm
from imaginaire_spade.models.spectral_norm import SpectralConv2d, SpectralConvTranspose2d, SpectralLinear, conv2d
from imaginaire_spade.registry import ENCODERS, GENERATORS, NORMS, DepthOrNone, Weight, Width, WidthOrNone

Interpolation = Literal["nearest", "bilinear", "nearest_then_bilinear"]
"""How a generator's x2 steps enlarge."""
NormFactory = Callable[[int, LayoutSpec], ConditionalNorm]
"""(channels, spec) -> a layer ``norm(x, layout)``."""


class Generator(nn.Module):
    """Interface of every generator: ``generator(layout, z=None)`` and two numbers."""

    size_multiple: int
    """Height and width of a layout must be multiples of this."""
    style_dims: int
    """Length of the style code z; 0: it takes none."""
    takes_local_noise: bool = False
    """Whether z may also be noise by region or by pixel (``layout.Noise``)."""
    halo: int | None = None
    """How far beyond a pixel, at most, the label map matters to it, up to a multiple of ``size_multiple``; None: all of
    it does. In evaluation mode."""

    def check_input(self, layout: SemanticLayout, z: Noise | None) -> None:
        """Raise ValueError if this generator does not take such a layout's size or style code."""
        if layout.height % self.size_multiple or layout.width % self.size_multiple:
            raise ValueError(
                f"layout of {layout.height}x{layout.width}: both must be multiples of {self.size_multiple}"
            )
        if (z is not None) != bool(self.style_dims):
            raise ValueError(f"style code {'missing' if z is None else 'given'}, but style_dims is {self.style_dims}")


class SPADEResidualBlock(nn.Module):
    """Residual block with conditional norms (Park et al. 2019, fig. 4 left): norm, leaky ReLU, convolution, twice.

    The shortcut is the identity; if the width changes, it is a norm and a 1x1 convolution without activation. Where it
    enlarges its input, it does so bilinearly (``is_smooth``) or by the nearest pixel.
    """

    def __init__(
        self, in_channels: int, out_channels: int, spec: LayoutSpec, norm: NormFactory, spectral_norm: bool,
        is_smooth: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        middle = min(in_channels, out_channels)
        self.is_smooth = is_smooth
        self.norm_0 = norm(in_channels, spec)
        self.conv_0 = conv2d(self.norm_0.out_channels, middle, 3, padding=1, spectral=spectral_norm)
        self.norm_1 = norm(middle, spec)
        self.conv_1 = conv2d(self.norm_1.out_channels, out_channels, 3, padding=1, spectral=spectral_norm)
        self.learned_shortcut = in_channels != out_channels
        if self.learned_shortcut:
            self.norm_s = norm(in_channels, spec)
            self.conv_s = conv2d(self.norm_s.out_channels, out_channels, 1, bias=False, spectral=spectral_norm)

    def forward(self, x: Tensor, layout: SemanticLayout, upsample: int = 1, noise: BlockNoise | None = None) -> Tensor:
        """Enlarge x [N, in, h, w] by ``upsample``, then apply the block: [N, out, upsample h, upsample w].

        Args:
            upsample: 1 or 2.
            noise: added to the enlarged input and to what the first convolution gives.
        """
        if upsample > 1 and self.is_smooth:
            x, upsample = enlarge_smoothly(x), 1
        if noise is not None:
            (of_x, of_y), (strength_x, strength_y) = noise
            x, upsample = enlarge(x, upsample), 1
            x = x + (strength_x * of_x).to(x.dtype)
        if self.learned_shortcut:  # upsampling is fused into the norms, so x is read at low resolution
            shortcut = convolve_modulated(self.conv_s, self.norm_s(x, layout, upsample=upsample))
        else:
            x, upsample = enlarge(x, upsample), 1
            shortcut = x
        y = convolve_modulated(self.conv_0, self.norm_0(x, layout, upsample=upsample, slope=0.2))
        if noise is not None:
            y = y + (strength_y * of_y).to(y.dtype)
        return shortcut + convolve_modulated(self.conv_1, self.norm_1(y, layout, slope=0.2))


@GENERATORS.register("spade")
class SPADEGenerator(Generator):
    """The generator of Park et al. 2019 (fig. 4 right): residual blocks with x2 up-sampling between them.

    It starts from the label map at 1/32 of the resolution (``normal``; 1/16 ``fewer``, 1/64 ``more``, 1/128 ``most``),
    or from a style code if ``style_dims`` > 0.

    Args:
        spec: channels of the layouts.
        image_size: (height, width) of training; fixes the start resolution of a style code.
        image_channels: C of the images, RGB or others.
        num_filters: width of the last block; the first has 16 times as many.
        style_dims: length of the style code z; 0: none is taken.
        upsampling: number of x2 steps: fewer 4 (small images), normal 5, more 6, most 7.
        interpolation: of the x2 steps: nearest (as published); bilinear, by which small runs draw leaves without lines
            along rows and columns, but windows without edges; or nearest_then_bilinear, the last half of the steps
            bilinear, the others nearest: windows with edges, leaves without dots (benchmarks/RESULTS.md).
        spectral_norm: spectral norm on the convolutions of the blocks.
        noise_injection: pixelwise noise inside each block, with a learned strength for each channel (StyleGAN, Karras
            et al. 2019, sec. 3.2): texture without grids, and several images for one label map. Where style_dims is 0
            the style code is two numbers, which choose the noise.
        norm: conditional normalisation layer.
    """

    def __init__(
        self,
        spec: LayoutSpec,
        image_size: tuple[int, int],
        image_channels: int = 3,
        *,
        num_filters: Width = 64,
        style_dims: WidthOrNone = 0,
        upsampling: Literal["fewer", "normal", "more", "most"] = "normal",
        interpolation: Interpolation = "nearest",
        spectral_norm: bool = True,
        noise_injection: bool = False,
        norm: Annotated[NormFactory, NORMS] = SPADE,
    ) -> None:
        super().__init__()
        more, most = upsampling in ("more", "most"), upsampling == "most"
        widths = [16, 16, 16, 16, 8, 4, 2, 1]
        channels = [num_filters * width for width in widths] + ([num_filters // 2] if most else [])
        self.upsample_before = (False, upsampling != "fewer", more, True, True, True, True, *((True,) if most else ()))
        self.size_multiple = 2 ** sum(self.upsample_before)
        self.noise = PixelNoise(channels) if noise_injection else None
        self.style_dims = style_dims or 2 * noise_injection
        self.starts_from_code = style_dims > 0
        self.start_size = (image_size[0] // self.size_multiple, image_size[1] // self.size_multiple)
        if style_dims:
            self.fc: nn.Module = nn.Linear(style_dims, channels[0] * self.start_size[0] * self.start_size[1])
        else:
            self.fc = nn.Conv2d(spec.num_channels, channels[0], 3, padding=1)
        self.smooth_before = smooth_steps(interpolation, self.upsample_before)
        self.blocks = nn.ModuleList(
            SPADEResidualBlock(a, b, spec, norm, spectral_norm, is_smooth)
            for (a, b), is_smooth in zip(itertools.pairwise(channels), self.smooth_before, strict=True)
        )
        self.to_image = nn.Conv2d(channels[-1], image_channels, 3, padding=1)

    @property
    def halo(self) -> int | None:  # type: ignore[override]
        return None if self.style_dims else reach_of_blocks(self, self.upsample_before, self.smooth_before)

    def forward(self, layout: SemanticLayout, z: Tensor | None = None) -> Tensor:
        """Generate images float32 [N, C, H, W] in [-1, 1] at the layout's size (a multiple of ``size_multiple``).

        Args:
            layout: N label maps [H, W].
            z: style codes float [N, style_dims]; required if and only if style_dims > 0 or there is noise injection.
        """
        self.check_input(layout, z)
        start = (layout.height // self.size_multiple, layout.width // self.size_multiple)
        if self.starts_from_code and z is not None:
            x = self.fc(z).unflatten(1, (-1, *self.start_size))  # [N, 16 F, h0, w0]
            x = F.interpolate(x, size=start, mode="bilinear", align_corners=False)  # exact if the size is the same
        else:
            x = self.fc(layout.resized(*start).one_hot(self.to_image.weight.dtype))  # [N, 16 F, h0, w0]
        for number, (block, doubles) in enumerate(zip(self.blocks, self.upsample_before, strict=True)):
            factor = 2 if doubles else 1
            noise = self.noise and self.noise(z, factor * x.shape[2], factor * x.shape[3], number)
            x = block(x, layout, upsample=factor, noise=noise)
        return torch.tanh(self.to_image(F.leaky_relu(x, 0.2, inplace=True)).float())  # [N, C, H, W]


def smooth_steps(interpolation: Interpolation, upsample_before: Sequence[bool]) -> list[bool]:
    """Tell of each block whether it enlarges its input bilinearly.

    Args:
        upsample_before: for each block, whether it enlarges its input.
    """
    steps = sum(upsample_before)
    nearest = {"nearest": steps, "nearest_then_bilinear": steps - steps // 2, "bilinear": 0}[interpolation]
    so_far = itertools.accumulate(upsample_before)
    return [doubles and number > nearest for doubles, number in zip(upsample_before, so_far, strict=True)]


def reach_of_blocks(generator: Generator, upsample_before: Sequence[bool], smooth_before: Sequence[bool]) -> int | None:
    """Compute the ``halo`` of residual blocks that start from the label map at 1 / ``size_multiple``.

    Args:
        upsample_before: for each block, whether it enlarges its input.
        smooth_before: and whether it does so bilinearly.
    """
    modules = list(generator.modules())
    if any(isinstance(module, InstanceNorm2d) for module in modules):
        return None
    # In pixels of the image: the last convolution, two per block, as many for a bilinear step, and what the first
    # block's norm sees at the coarsest resolution.
    multiple = scale = generator.size_multiple
    windows = [2 * (norm.kernel_size // 2) for norm in modules if isinstance(norm, SPADE)]
    reach = 1 + max([1, *windows]) * multiple
    for doubles, is_smooth in zip(upsample_before, smooth_before, strict=True):
        scale //= 1 + doubles
        reach += 2 * scale * (1 + is_smooth)
    return -(-reach // multiple) * multiple


class StyleBlock(nn.Module):
    """Adaptive norm, leaky ReLU, 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int, style_channels: int) -> None:
        super().__init__()
        self.norm = AdaptiveBatchNorm(in_channels, style_channels)
        self.conv = SpectralConv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        return self.conv(F.leaky_relu(self.norm(x, style), 0.2))


@GENERATORS.register("style_spade")
class StyleSPADEGenerator(Generator):
    """The SPADE generator of imaginaire: residual SPADE blocks with style blocks between them.

    It starts from the label map at 1/16, 1/32 or 1/64 of the resolution (``output_size`` 256, 512, 1024) and always
    takes a style code. All its layers carry spectral norm. Beyond 256, each further pair of blocks has its own image
    head, and the generator adds that image to the enlarged smaller one. Tested against imaginaire's numbers at 256
    without positional encoding; there are no numbers for 512, 1024 and the encoding, which follow its description.

    Args:
        spec: channels of the layouts.
        image_size: unused; this generator is fully convolutional.
        image_channels: C of the images, RGB or others.
        num_filters: widths are 8, 16, 8, 4, 2 times this, then once and half of it at 512 and 1024.
        style_dims: length of the style code z.
        output_size: shorter side of its images: 256, 512 or 1024 take 4, 5 or 6 x2 steps.
        positional_encoding: add two input channels, row and column of each pixel from -1 to 1.
        output_multiplier: factor before the final tanh.
        norm: conditional normalisation layer; imaginaire's has 5x5 convolutions, ``affine`` and ``spectral_norm``.
    """

    def __init__(
        self,
        spec: LayoutSpec,
        image_size: tuple[int, int],
        image_channels: int = 3,
        *,
        num_filters: Width = 128,
        style_dims: WidthOrNone = 256,
        output_size: Literal[256, 512, 1024] = 256,
        positional_encoding: bool = False,
        output_multiplier: Weight = 1.0,
        norm: Annotated[NormFactory, NORMS] = SPADE,
    ) -> None:
        super().__init__()
        if style_dims < 1:
            raise ConfigError("gen.style_dims: this generator needs a style code; write 256, or gen.type: spade")
        self.size_multiple = output_size // 16
        self.style_dims = style_dims
        self.output_size = output_size
        self.positional_encoding = positional_encoding
        self.output_multiplier = output_multiplier
        width, style_channels = num_filters, 2 * style_dims

        def block(in_channels: int, out_channels: int) -> SPADEResidualBlock:
            return SPADEResidualBlock(in_channels, out_channels, spec, norm, spectral_norm=True)

        self.fc_0 = SpectralLinear(style_dims, style_channels)
        self.fc_1 = SpectralLinear(style_channels, style_channels)
        self.head_0 = SpectralConv2d(spec.num_channels + 2 * positional_encoding, 8 * width, 3, padding=1)
        self.cbn_head_0 = StyleBlock(8 * width, 16 * width, style_channels)
        self.head_1 = block(16 * width, 16 * width)
        self.head_2 = block(16 * width, 16 * width)
        self.up_0a = block(16 * width, 8 * width)
        self.cbn_up_0a = StyleBlock(8 * width, 8 * width, style_channels)
        self.up_0b = block(8 * width, 8 * width)
        self.up_1a = block(8 * width, 4 * width)
        self.cbn_up_1a = StyleBlock(4 * width, 4 * width, style_channels)
        self.up_1b = block(4 * width, 4 * width)
        self.up_2a = block(4 * width, 4 * width)
        self.cbn_up_2a = StyleBlock(4 * width, 4 * width, style_channels)
        self.up_2b = block(4 * width, 2 * width)
        self.to_image = SpectralConv2d(2 * width, image_channels, 5, padding=2)
        if output_size >= 512:
            self.up_3a = block(2 * width, width)
            self.up_3b = block(width, width)
            self.to_image_512 = SpectralConv2d(width, image_channels, 5, padding=2)
        if output_size >= 1024:
            self.up_4a = block(width, width // 2)
            self.up_4b = block(width // 2, width // 2)
            self.to_image_1024 = SpectralConv2d(width // 2, image_channels, 5, padding=2)

    def forward(self, layout: SemanticLayout, z: Tensor | None = None) -> Tensor:
        """Generate images float32 [N, C, H, W] in [-1, 1] at the layout's size (a multiple of ``size_multiple``).

        Args:
            layout: N label maps [H, W].
            z: style codes float [N, style_dims].
        """
        self.check_input(layout, z)
        style = F.relu(self.fc_1(F.relu(self.fc_0(z))))  # [N, 2 style_dims]
        x = self._start(layout.resized(layout.height // self.size_multiple, layout.width // self.size_multiple))
        x = F.leaky_relu(self.head_0(x), 0.2)  # [N, 8 F, h, w]
        x = self.cbn_head_0(x, style)  # [N, 16 F, h, w]
        x = self.head_2(self.head_1(x, layout), layout)
        x = self.up_0a(x, layout, upsample=2)  # [N, 8 F, 2 h, 2 w]
        x = self.up_0b(self.cbn_up_0a(x, style), layout)
        x = self.up_1a(x, layout, upsample=2)  # [N, 4 F, 4 h, 4 w]
        x = self.up_1b(self.cbn_up_1a(x, style), layout)
        x = self.up_2a(x, layout, upsample=2)  # [N, 4 F, 8 h, 8 w]
        x = enlarge(self.up_2b(self.cbn_up_2a(x, style), layout), 2)  # [N, 2 F, 16 h, 16 w]
        image = self.to_image(F.leaky_relu(x, 0.2)).float()  # [N, C, 16 h, 16 w]
        if self.output_size >= 512:
            x = enlarge(self.up_3b(self.up_3a(x, layout), layout), 2)  # [N, F, 32 h, 32 w]
            image = enlarge(image, 2) + self.to_image_512(F.leaky_relu(x, 0.2))
        if self.output_size >= 1024:
            x = enlarge(self.up_4b(self.up_4a(x, layout), layout), 2)  # [N, F/2, 64 h, 64 w]
            image = enlarge(image, 2) + self.to_image_1024(F.leaky_relu(x, 0.2))
        return torch.tanh(self.output_multiplier * image)  # [N, C, H, W]

    def _start(self, layout: SemanticLayout) -> Tensor:
        """Return the first layer's input: float [N, num_channels (+ 2 coordinates), h, w]."""
        x = layout.one_hot(self.head_0.weight.dtype)
        if not self.positional_encoding:
            return x
        line = torch.linspace(-1, 1, 16, device=x.device)
        grid = torch.stack(torch.meshgrid(line, line, indexing="ij"))  # [2, 16, 16]: row, column
        grid = F.interpolate(grid[None], size=x.shape[-2:], mode="bicubic", align_corners=False)
        return torch.cat([x, grid.to(x.dtype).expand(x.shape[0], -1, -1, -1)], 1)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with instance norm, ReLU between them, reflection padding; added to the input."""

    def __init__(self, channels: int, spectral_norm: bool) -> None:
        super().__init__()
        self.conv_0 = conv2d(channels, channels, 3, padding=1, padding_mode="reflect", spectral=spectral_norm)
        self.conv_1 = conv2d(channels, channels, 3, padding=1, padding_mode="reflect", spectral=spectral_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to x [N, channels, h, w], h and w at least 2; the shape stays."""
        y = F.relu(instance_norm(self.conv_0(x)))
        return x + instance_norm(self.conv_1(y))


@GENERATORS.register("pix2pixhd")
class Pix2pixHDGenerator(Generator):
    """The global generator of Wang et al. 2018 (pix2pixHD, section 3.1 and appendix), "pix2pixHD" in SPADE's tables.

    The layout enters once, at full resolution; convolutions down-sample it, then come residual blocks, then transposed
    convolutions up-sample it again. Instance norm without scale and shift follows each convolution but the last. The
    generator takes no style code. With ``spectral_norm`` it is that of the SPADE paper's stronger "pix2pixHD++".

    Args:
        spec: channels of the layouts.
        image_size: (height, width) of training: multiples of 2^num_downsamplings, twice that or more.
        num_filters: width of the first and last layers; doubled by each down-sampling.
        num_downsamplings: x2 steps down and up again.
        num_blocks: residual blocks between them.
        spectral_norm: spectral norm on all convolutions but the last.
    """

    style_dims = 0

    def __init__(
        self,
        spec: LayoutSpec,
        image_size: tuple[int, int],
        image_channels: int = 3,
        *,
        num_filters: Width = 64,
        num_downsamplings: DepthOrNone = 4,
        num_blocks: DepthOrNone = 9,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        self.size_multiple = 2**num_downsamplings
        self.min_size = 2 * self.size_multiple  # reflection at the blocks' resolution needs two pixels
        if min(image_size) < self.min_size:
            raise ConfigError(
                f"gen.num_downsamplings: {num_downsamplings} needs images of {self.min_size} or more, not"
                f" {image_size[0]}x{image_size[1]}"
            )
        channels = [num_filters * 2**i for i in range(num_downsamplings + 1)]
        transposed = SpectralConvTranspose2d if spectral_norm else nn.ConvTranspose2d
        conv = partial(conv2d, spectral=spectral_norm)
        self.first = conv(spec.num_channels, num_filters, 7, padding=3, padding_mode="reflect")
        self.down = nn.ModuleList(conv(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(channels))
        self.blocks = nn.Sequential(*(ResidualBlock(channels[-1], spectral_norm) for _ in range(num_blocks)))
        self.up = nn.ModuleList(
            transposed(a, b, 3, stride=2, padding=1, output_padding=1) for a, b in itertools.pairwise(channels[::-1])
        )
        self.to_image = nn.Conv2d(num_filters, image_channels, 7, padding=3, padding_mode="reflect")

    def forward(self, layout: SemanticLayout, z: Tensor | None = None) -> Tensor:
        """Generate images float32 [N, C, H, W] in [-1, 1] at the layout's size (a multiple of ``size_multiple``).

        Args:
            layout: N label maps [H, W].
            z: None; this generator takes no style code.
        """
        self.check_input(layout, z)
        if min(layout.height, layout.width) < self.min_size:
            raise ValueError(f"layout of {layout.height}x{layout.width}: both must be {self.min_size} or more")
        x = layout.one_hot(self.to_image.weight.dtype)  # [N, num_channels, H, W]
        for layer in (self.first, *self.down):
            x = F.relu(instance_norm(layer(x)))
        x = self.blocks(x)  # [N, 16 F, H/16, W/16] with 4 down-samplings
        for layer in self.up:
            x = F.relu(instance_norm(layer(x)))
        return torch.tanh(self.to_image(x).float())  # [N, C, H, W]


@ENCODERS.register("conv")
class ConvEncoder(nn.Module):
    """The image encoder of Park et al. 2019 (fig. 14): six strided convolutions, two linear heads.

    Args:
        style_dims: length of the style code, the generator's.
        image_channels: C of the images, RGB or others.
        num_filters: width of the first layer; the last has 8 times as many.
        image_size: the encoder resizes images of any other size to this square first (bilinear). A multiple of 64,
            128 or more: six x2 down-samplings, and an instance norm after the last.
        normalization: instance norm after each convolution, or none (as in imaginaire).
    """

    def __init__(
        self,
        style_dims: int,
        image_channels: int = 3,
        *,
        num_filters: Width = 64,
        image_size: Width = 256,
        normalization: Literal["instance", "none"] = "instance",
    ) -> None:
        super().__init__()
        if image_size % 64 or image_size < 128:
            raise ConfigError(f"encoder.image_size: {image_size} must be 128 or more and a multiple of 64")
        self.image_size = image_size
        channels = [image_channels, *(num_filters * width for width in (1, 2, 4, 8, 8, 8))]
        self.with_norm = normalization == "instance"
        self.layers = nn.ModuleList(
            SpectralConv2d(a, b, 3, 2, 1, bias=not self.with_norm) for a, b in itertools.pairwise(channels)
        )
        size = channels[-1] * (image_size // 64) ** 2
        self.fc_mu = nn.Linear(size, style_dims)
        self.fc_var = nn.Linear(size, style_dims)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images float [N, C, H, W] in [-1, 1] -> (mu, logvar), float32 [N, style_dims] each."""
        x = images
        if x.shape[-2:] != (self.image_size, self.image_size):
            x = F.interpolate(x, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False)
        for layer in self.layers:
            x = layer(x)
            x = F.leaky_relu(instance_norm(x) if self.with_norm else x, 0.2)
        x = x.flatten(1)
        return self.fc_mu(x).float(), self.fc_var(x).float()


def sample_style(mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Draw z = mu + noise * sigma, the reparameterisation of Kingma and Welling 2014; all [N, style_dims]."""
    return mu + noise * torch.exp(0.5 * logvar)
