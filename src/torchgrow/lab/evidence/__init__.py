"""What was measured, as one page with the paper's figures and beside the paper's tables."""
