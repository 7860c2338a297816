#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#define RF_TABLES(isa)                        \
  namespace rf {                              \
  namespace isa {                             \
  extern const Logprob logprob_table;         \
  extern const LinearLogprob linear_logprob_table; \
  extern const Advantage advantage_table;     \
  extern const PlainAdvantage plain_advantage_table; \
  extern const OffPolicy off_policy_table;    \
  extern const PolicyLoss policy_loss_table;  \
  extern const Attribution attribution_table; \
  extern const QLearning q_learning_table;    \
  extern const QLoss q_loss_table;            \
  extern const Stream stream_table;           \
  extern const Whiten whiten_table;           \
  }                                           \
  }

#define RF_ENTRY(isa)                                                          \
  {                                                                            \
    #isa, &isa::logprob_table, &isa::linear_logprob_table, &isa::advantage_table, \
        &isa::plain_advantage_table, &isa::off_policy_table, &isa::policy_loss_table, &isa::attribution_table, \
        &isa::q_learning_table, &isa::q_loss_table, &isa::stream_table, &isa::whiten_table                     \
  }

RF_TABLES(baseline)
#if defined(__x86_64__)
RF_TABLES(avx2)
#if defined(RF_AVX512)
RF_TABLES(avx512)
RF_TABLES(avx512_bf16)
#endif
#endif

namespace rf {
namespace {

struct Candidate {
  Kernels kernels;
  bool supported;
};

const std::vector<Candidate>& candidates() {
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(RF_AVX512)
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  static const std::vector<Candidate> all = {
      {RF_ENTRY(baseline), true},
      {RF_ENTRY(avx2), avx2},
#if defined(RF_AVX512)
      {RF_ENTRY(avx512), avx512},
      {RF_ENTRY(avx512_bf16), avx512 && __builtin_cpu_supports("avx512bf16")},
#endif
  };
#else
  static const std::vector<Candidate> all = {{RF_ENTRY(baseline), true}};
#endif
  return all;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const Kernels* find(const std::string& name) {
  for (const auto& candidate : candidates()) {
    if (name == candidate.kernels.isa && candidate.supported) return &candidate.kernels;
  }
  throw std::invalid_argument("REACT_FAST_ISA must be one of " + joined(supported_isas()) +
                              " on this machine, got '" + name + "'");
}

const Kernels* initial() {
  const char* forced = std::getenv("REACT_FAST_ISA");
  return find(forced != nullptr && *forced != '\0' ? forced : supported_isas().back());
}

const Kernels*& active() {
  static const Kernels* chosen = initial();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *active(); }

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const auto& candidate : candidates()) names.emplace_back(candidate.kernels.isa);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const auto& candidate : candidates()) {
    if (candidate.supported) names.emplace_back(candidate.kernels.isa);
  }
  return names;
}

void set_isa(const std::string& name) { active() = find(name); }

}  // namespace rf
