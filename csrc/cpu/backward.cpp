#include "kernels.h"
namespace tf { namespace TF_ISA {
int64_t backward_workspace(const Problem&) { return 0; }
void backward(const Problem&, const Sequence&, const BackwardRun&, char*) {}
} }
