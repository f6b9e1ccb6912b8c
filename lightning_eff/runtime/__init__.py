"""What a run needs and Lightning need not know: ranks, seeds, streams of draws, roll calls, figures."""
