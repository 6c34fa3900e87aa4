"""Tasks made of what people have: a module, a transformers model, a LightningModule.

Each adapter is a `Task` like any other, so all that holds for tasks holds for it. None of the
libraries is imported before its adapter is used.
"""
