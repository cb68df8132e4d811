"""Operations that are faster than PyTorch's own on some hardware."""
