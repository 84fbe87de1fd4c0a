"""What a certificate of losslessness checks: one file for each check."""
