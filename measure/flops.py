"""Floating-point operations of a model of train_apelr.py, which MFU counts."""


def flops_per_token(model) -> float:
    """6 x weights of matrix products + full attention, the convention of PaLM (Chowdhery et al. 2022).

    The head of every plan counts: experts that read an input a plan (version 1) use theirs once a plan.
    """
    heads, bias = model.experts.table()
    products = sum(weight.numel() for weight in model.backbone.parameters() if weight.ndim == 2)
    if hasattr(model.experts, "state_proj"):
        products += model.experts.state_proj.weight.numel() + len(bias) * heads.numel()
    else:
        products += heads.numel()
    layers = len(getattr(model.backbone, "layers", ()))  # of attention
    return 6.0 * (products + 2 * layers * model.cfg.seq_len * model.cfg.d_model)
