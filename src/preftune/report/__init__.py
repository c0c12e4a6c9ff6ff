"""The report of a run: one page that opens anywhere, and the same curves as pictures. No torch in here.

folder    reads the run folder's files as they are, and says what is missing
curves    which charts exist (one table), and their points
svg, png  draw a chart for the page, and for papers and chats
words     figures as people write them
verdicts  the outcome in one sentence
record    what rules read of a run; rules: a function for each pattern; diagnosis: the table of them, with what to change
page      puts the page together; page.html is its template, page.js shows values under the pointer
compare   several runs on one page; comparison.html is its template
checked   the report of a check: its figures in words, for the terminal and for a page of its own; check.html is its template
"""

from preftune.report.page import findings, verdict, write

__all__ = ["findings", "verdict", "write"]
