// The compiled scan against plain double-precision loops, without Python: for processors that only an emulator has, and for
// sanitizers. Exit code 0 if every value and gradient agrees.  usage: scan_check
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>
#include "../i2i_mamba_nb/csrc/scan.cpp"

typedef std::vector<float> Floats;
typedef std::vector<double> Doubles;
struct Case { int b, g, c, n, l, threads; bool z, last_layout; int rank; };
static std::mt19937 source(1);
static Floats normal(size_t size, float scale = 1) {
  std::normal_distribution<float> d(0, scale);
  Floats x(size);
  for (float& v: x) v = d(source);
  return x;
}
static double sigma(double x) { return 1/(1 + std::exp(-x)); }
static double worst(const Floats& got, const Doubles& wanted) {
  double most = 1e-30, off = 0;
  for (size_t i = 0; i < got.size(); i++) most = std::max(most, std::fabs(wanted[i])), off = std::max(off, std::fabs(got[i] - wanted[i]));
  return off/most;
}

static double check(const Case& k) {
  const int b = k.b, d = k.g*k.c, n = k.n, l = k.l;
  Floats u = normal(b*d*l), delta = normal(b*d*l), z = normal(b*d*l), A = normal(d*n), B = normal(b*k.g*n*l), C = normal(b*k.g*n*l), D = normal(d),
    bias = normal(d), gy = normal(b*d*l), gl = normal(b*d*n), h0 = normal(b*d*n);
  for (float& a: A) a = -std::exp(a);
  const int rank = k.rank;       // of the factors that delta is made from; 0: none
  Floats factors = normal(b*k.g*l*rank + 1), maker = normal(d*rank + 1);
  Floats y(b*d*l), last(b*d*n), gu(b*d*l), gdelta(b*d*l), gz(b*d*l), gB(B.size()), gC(C.size()), gh0(b*d*n);
  auto at = [&](int i, int j, int t) { return k.last_layout ? (size_t)(i*l + t)*d + j : (size_t)(i*d + j)*l + t; };      // (b d l) or (b l d)
  auto seq = [&](Floats& x) { return k.last_layout ? View{(char*)x.data(), d*l, k.c, 1, d, FLOAT32} : View{(char*)x.data(), d*l, k.c*l, l, 1, FLOAT32}; };
  auto weight = [&](Floats& x) { return View{(char*)x.data(), k.g*n*l, n*l, l, 1, FLOAT32}; };

  auto factor = [&](int i, int j, int t) { return &factors[((size_t)(i*k.g + j/k.c)*l + t)*rank]; };
  if (rank) for (int i = 0; i < b; i++) for (int j = 0; j < d; j++) for (int t = 0; t < l; t++) {
    double sum = 0;
    for (int r = 0; r < rank; r++) sum += (double)factor(i, j, t)[r]*maker[j*rank + r];
    delta[at(i, j, t)] = (float)sum;
  }

  Scan s{};
  s.batch = b, s.groups = k.g, s.channels = k.c, s.states = n, s.length = l, s.softplus = 1, s.threads = k.threads;
  s.u = seq(u), s.delta = seq(delta), s.B = weight(B), s.C = weight(C), s.y = seq(y);
  if (rank) s.delta = View{(char*)factors.data(), k.g*l*rank, l*rank, 1, rank, FLOAT32}, s.rank = rank, s.delta_weight = maker.data();
  if (k.z) s.z = seq(z), s.grad_z = seq(gz);
  s.A = A.data(), s.D = D.data(), s.bias = bias.data(), s.initial = h0.data(), s.last = last.data();
  s.segments = scan_segments(&s);
  Floats borders(b*k.g*blocks_of(s)*up(l, CHUNK)*n*W), pA(b*s.segments*d*n), pD(b*s.segments*d), pbias(pD.size()), pmaker(pD.size()*rank);
  s.borders = borders.data();
  scan_forward(&s);
  s.grad_y = seq(gy), s.grad_u = seq(gu), s.grad_delta = seq(gdelta), s.grad_B = weight(gB), s.grad_C = weight(gC), s.grad_last = gl.data();
  s.grad_A = pA.data(), s.grad_D = pD.data(), s.grad_bias = pbias.data(), s.grad_delta_weight = pmaker.data(), s.grad_initial = gh0.data();
  scan_backward(&s);

  Doubles ry(y.size()), rlast(last.size()), ru(y.size()), rdelta(y.size()), rz(y.size()), rA(d*n), rB(B.size()), rC(C.size()), rD(d), rbias(d), rmaker(d*rank), rh0(gh0.size());
  for (int i = 0; i < b; i++) for (int j = 0; j < d; j++) {
    Doubles h((l + 1)*n), g(n), dt(l), slope(l), e(n);
    for (int m = 0; m < n; m++) h[m] = h0[(i*d + j)*n + m];
    auto w = [&](int m, int t) { return (size_t)((i*k.g + j/k.c)*n + m)*l + t; };
    for (int t = 0; t < l; t++) {
      const double raw = (double)delta[at(i, j, t)] + bias[j];
      dt[t] = std::log1p(std::exp(-std::fabs(raw))) + std::max(raw, 0.), slope[t] = sigma(raw);
      double sum = (double)D[j]*u[at(i, j, t)];
      for (int m = 0; m < n; m++) {
        h[(t + 1)*n + m] = std::exp(dt[t]*A[j*n + m])*h[t*n + m] + dt[t]*u[at(i, j, t)]*B[w(m, t)];
        sum += C[w(m, t)]*h[(t + 1)*n + m];
      }
      const double q = z[at(i, j, t)], gate = k.z ? q*sigma(q) : 1;
      rz[at(i, j, t)] = gy[at(i, j, t)]*sum*sigma(q)*(1 + q*(1 - sigma(q)));
      ry[at(i, j, t)] = sum*gate;
    }
    for (int m = 0; m < n; m++) rlast[(i*d + j)*n + m] = h[l*n + m], g[m] = gl[(i*d + j)*n + m];
    for (int t = l - 1; t >= 0; t--) {
      const double q = z[at(i, j, t)], go = gy[at(i, j, t)]*(k.z ? q*sigma(q) : 1), x = u[at(i, j, t)];
      double of_dt = 0, of_du = 0;
      for (int m = 0; m < n; m++) {
        const double a = std::exp(dt[t]*A[j*n + m]), before = h[t*n + m];
        g[m] += go*C[w(m, t)];
        rC[w(m, t)] += go*h[(t + 1)*n + m], rB[w(m, t)] += g[m]*dt[t]*x;
        of_du += g[m]*B[w(m, t)], of_dt += g[m]*a*before*A[j*n + m], rA[j*n + m] += g[m]*a*before*dt[t];
        g[m] *= a;
      }
      ru[at(i, j, t)] = of_du*dt[t] + D[j]*go, rdelta[at(i, j, t)] = (of_dt + of_du*x)*slope[t];
      rD[j] += go*x, rbias[j] += rdelta[at(i, j, t)];
      for (int r = 0; r < rank; r++) rmaker[j*rank + r] += rdelta[at(i, j, t)]*factor(i, j, t)[r];
    }
    for (int m = 0; m < n; m++) rh0[(i*d + j)*n + m] = g[m];
  }
  auto whole = [&](const Floats& parts, size_t size) { Floats sum(size); for (size_t i = 0; i < parts.size(); i++) sum[i % size] += parts[i]; return sum; };
  double off = std::max({worst(y, ry), worst(last, rlast), worst(gu, ru), worst(gdelta, rdelta), worst(whole(pA, d*n), rA), worst(gB, rB), worst(gC, rC),
    worst(whole(pD, d), rD), worst(whole(pbias, d), rbias), worst(gh0, rh0)});
  if (rank) off = std::max(off, worst(whole(pmaker, d*rank), rmaker));
  return k.z ? std::max(off, worst(gz, rz)) : off;
}

int main() {
  double most = 0;
  int cases = 0;
  for (int b: {1, 2}) for (int g: {1, 2}) for (int c: {1, 5, 17, 70}) for (int n: {1, 3, 16, 21}) for (int l: {1, 16, 33, 700}) {
    const Case k{b, g, c, n, l, 1 + cases % 3, cases % 2 == 0, cases % 5 < 2, cases % 7 < 3 ? 0 : cases % 7};
    const double off = check(k);
    // the few numbers of a single step may cancel
    if (!(off < (l == 1 ? 1e-4 : 2e-5))) { printf("b %d g %d c %d n %d l %d threads %d: off by %g\n", b, g, c, n, l, k.threads, off); return 1; }
    most = std::max(most, off), cases++;
  }
  printf("%d cases on lanes of %d, largest relative error %.2g\n", cases, W, most);
  return 0;
}
