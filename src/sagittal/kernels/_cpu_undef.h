/* Makes room for the next instruction set. */
#undef ISA
#undef LANES
#undef MANY_REGISTERS
#undef vf
#undef vi
#undef FORWARD_TILE
#undef TRANSPOSED_TILE
#undef DEPTHWISE_TASK
#undef WEIGHT_TASK
#undef PRODUCT_TILE
#undef PRODUCT_PANEL
#undef PRODUCT_COLUMNS
#undef SWEEP_TASK
#undef SWEEP_UP_TASK
#undef SWEEP_UP_TILE
