"""What the user hands in: a task and its settings, and how another process gets hold of the task.

A *task* is the user's code: a model, data, a loss and an optimizer. A *job* is a task with the
*settings* of its run. A *recipe* is a function that returns a job. A *task source* is a task's
name with arguments, or the pickled task. A *position* says where in a run a call belongs.

task             the class that users subclass
loss_form        what `Task.loss` may return: a loss, or a loss and what is to be logged
task_source      a task's name and arguments, or the pickled task
script_state     what a script has set in modules, for the forkserver, which imports them anew
plain_values     numbers, texts and containers of them, in a form that can be compared and sent
tensor_pickling  a task's pickle with its tensors as they share memory, and no more of it
task_resolution  from a task source to the task
task_checks      what every task must have
offered_names    checks of a task name that another host has sent
position         where in a run a call of the task's methods belongs
job              a task with its settings
settings         fields that declare their limits, their option and their documentation
setting_checks   those that have to fit each other
settings_table   the generated tables of docs/job-files.md
run_request      a job as it was asked for, with the settings that were given
job_file         YAML files that describe a job
faults           scripted faults, for tests
code_digest      a digest of the source files that define a task
code_archive     a task's code as an archive for other hosts
"""
