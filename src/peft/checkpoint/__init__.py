"""Bytes and names: everything between an adapter in memory and the files that hold it.

    strict_json, header   parse what strangers wrote; no torch
    tensors               read and encode weights
    files, hub            where files lie, and how a folder of them is replaced all at once
    fingerprint, report   does this file belong to this model, and if not, why

Importing this package, `files`, `hub`, `header` or `report` does not import torch.
"""
