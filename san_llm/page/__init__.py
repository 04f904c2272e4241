"""One page about runs, for a reader who was not there: facts -> judged answers -> HTML."""
