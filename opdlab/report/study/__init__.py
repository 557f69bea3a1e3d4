"""The part of a report that is about a study: paired comparisons of every variant with its baseline."""
