"""YOLOX once more, from its description and under the names of its release checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BaseConv(nn.Module):
    def __init__(self, cin: int, cout: int, k: int, s: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, k, s, (k - 1) // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=1e-3, momentum=0.03)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))


class DWConv(nn.Module):
    def __init__(self, cin: int, cout: int, k: int, s: int = 1) -> None:
        super().__init__()
        self.dconv = BaseConv(cin, cin, k, s, groups=cin)
        self.pconv = BaseConv(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pconv(self.dconv(x))


class Bottleneck(nn.Module):
    def __init__(self, c: int, shortcut: bool, conv: type) -> None:
        super().__init__()
        self.conv1, self.conv2, self.shortcut = BaseConv(c, c, 1), conv(c, c, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        return x + y if self.shortcut else y


class CSP(nn.Module):
    def __init__(self, cin: int, cout: int, n: int, shortcut: bool, conv: type) -> None:
        super().__init__()
        h = cout // 2
        self.conv1, self.conv2, self.conv3 = BaseConv(cin, h, 1), BaseConv(cin, h, 1), BaseConv(2 * h, cout, 1)
        self.m = nn.Sequential(*(Bottleneck(h, shortcut, conv) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(torch.cat((self.m(self.conv1(x)), self.conv2(x)), 1))


class SPP(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = BaseConv(c, c // 2, 1), BaseConv(2 * c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.conv2(torch.cat([x, *(F.max_pool2d(x, k, 1, k // 2) for k in (5, 9, 13))], 1))


class Focus(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = BaseConv(12, c, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = (x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2])
        return self.conv(torch.cat(patches, 1))


class Darknet(nn.Module):
    def __init__(self, b: int, n: int, conv: type) -> None:
        super().__init__()
        self.stem = Focus(b)
        self.dark2 = nn.Sequential(conv(b, 2 * b, 3, 2), CSP(2 * b, 2 * b, n, True, conv))
        self.dark3 = nn.Sequential(conv(2 * b, 4 * b, 3, 2), CSP(4 * b, 4 * b, 3 * n, True, conv))
        self.dark4 = nn.Sequential(conv(4 * b, 8 * b, 3, 2), CSP(8 * b, 8 * b, 3 * n, True, conv))
        self.dark5 = nn.Sequential(conv(8 * b, 16 * b, 3, 2), SPP(16 * b), CSP(16 * b, 16 * b, n, False, conv))


class PAFPN(nn.Module):
    def __init__(self, b: int, n: int, conv: type) -> None:
        super().__init__()
        self.backbone = Darknet(b, n, conv)
        self.lateral_conv0, self.C3_p4 = BaseConv(16 * b, 8 * b, 1), CSP(16 * b, 8 * b, n, False, conv)
        self.reduce_conv1, self.C3_p3 = BaseConv(8 * b, 4 * b, 1), CSP(8 * b, 4 * b, n, False, conv)
        self.bu_conv2, self.C3_n3 = conv(4 * b, 4 * b, 3, 2), CSP(8 * b, 8 * b, n, False, conv)
        self.bu_conv1, self.C3_n4 = conv(8 * b, 8 * b, 3, 2), CSP(16 * b, 16 * b, n, False, conv)

    def forward(self, x: Tensor) -> list[Tensor]:
        c3 = self.backbone.dark3(self.backbone.dark2(self.backbone.stem(x)))
        c4 = self.backbone.dark4(c3)
        lateral = self.lateral_conv0(self.backbone.dark5(c4))
        up = nn.Upsample(scale_factor=2)
        p4 = self.C3_p4(torch.cat((up(lateral), c4), 1))
        reduced = self.reduce_conv1(p4)
        p3 = self.C3_p3(torch.cat((up(reduced), c3), 1))
        n3 = self.C3_n3(torch.cat((self.bu_conv2(p3), reduced), 1))
        return [p3, n3, self.C3_n4(torch.cat((self.bu_conv1(n3), lateral), 1))]


class Head(nn.Module):
    def __init__(self, b: int, nc: int, conv: type) -> None:
        super().__init__()
        d = 4 * b
        self.stems = nn.ModuleList(BaseConv(c * b, d, 1) for c in (4, 8, 16))
        self.cls_convs = nn.ModuleList(nn.Sequential(conv(d, d, 3), conv(d, d, 3)) for _ in range(3))
        self.reg_convs = nn.ModuleList(nn.Sequential(conv(d, d, 3), conv(d, d, 3)) for _ in range(3))
        self.cls_preds = nn.ModuleList(nn.Conv2d(d, nc, 1) for _ in range(3))
        self.reg_preds = nn.ModuleList(nn.Conv2d(d, 4, 1) for _ in range(3))
        self.obj_preds = nn.ModuleList(nn.Conv2d(d, 1, 1) for _ in range(3))


class PublicYolox(nn.Module):
    """Raw outputs per level: (B, 4 + 1 + classes, h, w)."""

    def __init__(self, depth: float, width: float, num_classes: int, depthwise: bool) -> None:
        super().__init__()
        b, n, conv = int(64 * width), max(round(3 * depth), 1), DWConv if depthwise else BaseConv
        self.backbone = PAFPN(b, n, conv)
        self.head = Head(b, num_classes, conv)

    def forward(self, images: Tensor) -> list[Tensor]:
        outputs = []
        for level, features in enumerate(self.backbone(images)):
            x = self.head.stems[level](features)
            classes = self.head.cls_preds[level](self.head.cls_convs[level](x))
            regression = self.head.reg_convs[level](x)
            outputs.append(
                torch.cat((self.head.reg_preds[level](regression), self.head.obj_preds[level](regression), classes), 1)
            )
        return outputs
