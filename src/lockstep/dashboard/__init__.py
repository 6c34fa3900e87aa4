"""The page: runs in a browser, while they go on and afterwards, and requests to them.

It reads run folders, as everybody can who owns them, and leaves requests where the commands leave
them. Nothing is read from a run's processes. The *token* is in the address after `#`, which
browsers do not send: the page shows it in a header with each question, so no other page can ask.

server    the web server: `lockstep watch`, and `run --dashboard`
app       what it answers: pages, runs, a run's stream, comparisons, requests
security  the token, the hosts that are answered, the headers of every answer
feed      one run for all who watch it: looks for what is new, and says what each has not seen
"""
