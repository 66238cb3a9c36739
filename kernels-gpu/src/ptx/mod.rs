//! One wrapper per PTX instruction.
