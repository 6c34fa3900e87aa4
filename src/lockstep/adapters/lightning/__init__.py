"""Adapter for LightningModules, without Lightning's Trainer.

A *hook* is a method that Lightning's Trainer would call. A *parcel* is what one held-out batch
leaves in the module: states of metrics and items of lists.

task              `from_lightning`, and the task that it returns
hooks             which hooks are called, and which are refused
dataloaders       the data set and the collate_fn of a DataLoader
optimizers        the forms of configure_optimizers, and a schedule that follows another
trainer_stub      what `self.trainer` answers
logs              what `self.log` and `self.log_dict` keep
validation_state  metrics and lists gathered over held-out batches
predictions       rows of `lockstep predict` from predict_step
"""
