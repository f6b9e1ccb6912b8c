"""The papers that the methods come from: authors, title, venue, year, address; or none."""

from __future__ import annotations

OURS = ""
"""Of a method that is this package's own: there is no paper."""

BFLOAT16_STUDY = (
    "Kalamkar et al.: A Study of BFLOAT16 for Deep Learning Training. 2019. https://arxiv.org/abs/1905.12322"
)

DFP16 = (
    "Das et al.: Mixed Precision Training of Convolutional Neural Networks using Integer Operations. ICLR 2018. "
    "https://arxiv.org/abs/1802.00930"
)

DROPCOMPUTE = (
    "Giladi, Gottlieb, Shkolnik, Karnieli, Banner, Hoffer, Levy, Soudry: DropCompute: simple and more robust "
    "distributed synchronous training via compute variance reduction. NeurIPS 2023. "
    "https://arxiv.org/abs/2306.10598"
)

FLEXPOINT = (
    "Koester, Webb, Wang, Nassar, Bansal, Constable, Elibol, Gray, Hall, Hornof, Khosrowshahi, Kloss, Pai, Rao: "
    "Flexpoint: An Adaptive Numerical Format for Efficient Training of Deep Neural Networks. NIPS 2017. "
    "https://arxiv.org/abs/1711.02213"
)

FP8 = "Micikevicius et al.: FP8 Formats for Deep Learning. 2022. https://arxiv.org/abs/2209.05433"

LUQ = (
    "Chmiel, Banner, Hoffer, Ben-Yaacov, Soudry: Accurate Neural Training with 4-bit Matrix Multiplications at "
    "Standard Formats. ICLR 2023. https://arxiv.org/abs/2112.10769"
)

NEAR_LOGNORMAL = (
    "Chmiel, Ben-Uri, Shkolnik, Hoffer, Banner, Soudry: Neural gradients are near-lognormal: improved quantized "
    "and sparse training. ICLR 2021. https://arxiv.org/abs/2006.08173"
)

PIPELINED_BP = (
    "Kosson, Chiley, Venigalla, Hestness, Köster: Pipelined backpropagation at scale: training large models "
    "without batches. MLSys 2021. https://arxiv.org/abs/2003.11666"
)

REVISITING_BFLOAT16 = (
    "Zamirai, Zhang, Aberger, De Sa: Revisiting BFloat16 Training. 2020. https://arxiv.org/abs/2010.06192"
)

SPLIT_SGD = (
    "Kalamkar et al.: Optimizing Deep Learning Recommender Systems Training on CPU Cluster Architectures "
    "(Split-SGD). SC 2020. https://arxiv.org/abs/2005.04680"
)
