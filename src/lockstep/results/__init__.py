"""Stage 5, aggregate: what a run records, and how it is read again.

The *run folder* holds everything about a run. The *manifest* has what is needed to repeat it, its
*identity* what the results depend on. The *ledger* has a hash-chained line for each committed step.
A *checkpoint* is the committed state on disk, a *fingerprint* the digest of a state.

run_folder       the folder's files, its lock, and the list of events
manifest         job, plan, numerics profile and identity of a run
origin_mark      by which a user's own runs are told from those of others
event_schema     the lines of `events.jsonl` as typed structs
events_table     the table of events in docs/events.md
event_words      an event as a line for people
metering         the pace and the times of a run, over intervals that grow with it
master_process   the process that leads a run: what the events say of it, and whether it lives
ledger           the hash-chained record of committed steps, and of evaluations that decide
decision_check   whether a run has done what its metrics decide
best_checkpoint  which checkpoint is the best by the job's metric, and checkpoints by name
checkpoint       states as safetensors, checked by digests
recorder         the observer that writes all of these while the run goes on
callbacks        a user's observers of a run, each in a thread of its own
loggers          callbacks that write metrics for TensorBoard, MLflow, W&B or trackio
recoveries       recoveries in words
run_history      pure: events folded into the rows that page, report and terminal show
run_reader       reads a run folder while it is written
run_list         the run folders that there are, by name, with their summaries
run_summary      pure: what a run is and how it stands
run_comparison   two runs: settings that differ, and the first step at which their ledgers part
ledger_check     the ledger's chain of hashes, checked a part at a time
restart          the state from which a run is resumed
result           the result as one object and one JSON document
prediction_file  the rows of a prediction, in order and resumable
progress         a progress bar, or lines, on stderr
notebook_display  progress as an output of a notebook's cell
report           `report.html`, made from the run folder
timeline_chart   the lanes of a run's workers as SVG, for the report
charts           the report's curves as SVG
"""
