"""The operator: y = sum_parts Q(Tx) . Qw  +  (x D) U  +  LoRA branches  +  b."""
