"""Adapters: tasks made of an `nn.Module`, a transformers model or a LightningModule.

An *adapter* is a function that returns a `Task`, so every guarantee for tasks holds for it. No
library is imported before its adapter is used.

module        `from_module`: any `nn.Module` with a data set and a loss
transformers  `from_transformers`: models of Hugging Face transformers
lightning     `from_lightning`: LightningModules without Lightning's Trainer
common        what the adapters share: optional packages, functions that build parts
"""
