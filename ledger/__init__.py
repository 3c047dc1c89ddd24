"""What is proven and owed: the job log, receipts, settlement, the Chain port and its adapters."""
