"""What can be tested of the npu path without a card."""
