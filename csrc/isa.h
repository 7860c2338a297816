// Which instruction set runs. Every hot path is one source file compiled once per instruction set into
// namespace rf::<isa>; each of those exports one table of function pointers per hot path, and kernels()
// returns the tables of the set that is active.
//
// A source that is compiled per instruction set keeps every function inside its namespace and calls no
// out-of-line template of the standard library: the linker keeps one copy of such a template, and that copy
// could hold instructions the machine does not have.
#pragma once

#include <string>
#include <vector>

#include "advantage.h"
#include "advantage_plain.h"
#include "attribution.h"
#include "linear_logprob.h"
#include "logprob.h"
#include "off_policy.h"
#include "policy_loss.h"
#include "q_learning.h"
#include "q_loss.h"
#include "stream.h"
#include "whiten.h"

namespace rf {

struct Kernels {
  const char* isa;
  const Logprob* logprob;
  const LinearLogprob* linear_logprob;
  const Advantage* advantage;
  const PlainAdvantage* plain_advantage;
  const OffPolicy* off_policy;
  const PolicyLoss* policy_loss;
  const Attribution* attribution;
  const QLearning* q_learning;
  const QLoss* q_loss;
  const Stream* stream;
  const Whiten* whiten;
};

// The tables of the active set: the best one the machine has, or the one REACT_FAST_ISA names.
// Throws std::invalid_argument when REACT_FAST_ISA names a set that is unknown or not supported here.
const Kernels& kernels();

// Sets this build holds, worst first, and those of them this machine can run.
std::vector<std::string> compiled_isas();
std::vector<std::string> supported_isas();

// Switches at run time (tests compare the sets in one process).
void set_isa(const std::string& name);

}  // namespace rf
