// The instruction set in use: the widest that the processor has, or the one VLMFAST_ISA names.
#pragma once

namespace vlmfast::cpu {

enum class Isa : int { scalar, avx2, avx512, avx512bf16 };

// Throws std::runtime_error if VLMFAST_ISA is unknown or names what the processor or the build lacks.
Isa isa();
const char* isa_name();
// Names of the instruction sets in this build, widest last, separated by spaces.
const char* isas_built();

}  // namespace vlmfast::cpu
